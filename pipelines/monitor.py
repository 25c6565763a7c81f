"""What a run sees of the machinery that its pipelines share: how busy the pool is, who had it, what the caches gave."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import ray

from actors.gpu import GpuUse
from actors.metrics import POOL_GENERATORS, POOL_OUTSTANDING, POOL_QUEUE, POOL_UTILISATION
from actors.spawn import ask, gather
from pipelines.context import Context
from plumbline.errors import LostError, RunError
from plumbline.runs.mirror import push_logs

EVERY = 5.0
"""Seconds between two looks at the pool, and at first between two of its lines."""
SHARE = 2000
"""Later they come after this part of the time since the start, so that a month has some ten thousand, not 500,000."""

PUSHED_PER_S = 2**18
"""Bytes of the events that go to the storage a second, at most: they go whole each time, and a month's are 20 MB."""


async def monitor_pool(context: Context, ended: asyncio.Event) -> None:
    """Write a line of the pool now and then, and a last one once `ended` is set: its totals are the whole run's."""
    clock, busy, sampled = time.monotonic(), await busy_seconds(context), 0
    begun = written = clock
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), EVERY)
        pool, now, now_busy = context.pool, time.monotonic(), await busy_seconds(context)
        total = sum(account.sampled for account in pool.accounts.values())
        utilisation = busy_share(busy, now_busy, now - clock)
        POOL_GENERATORS.set(len(pool.generators))
        POOL_QUEUE.set(pool.queue)
        POOL_OUTSTANDING.set(pool.outstanding)
        POOL_UTILISATION.set(utilisation)
        if not ended.is_set() and now - written < (now - begun) / SHARE:
            continue
        written = now
        asked = await counts(context)
        context.events.write(
            {
                "pipeline": "pool",
                "tokens_per_s": (total - sampled) / (now - clock),
                "queue": pool.queue,
                "utilisation": utilisation,
                "shares": pool.shares(),
                "longest_waits": {name: account.longest_wait for name, account in pool.accounts.items()},
                **asked,
            }
        )
        if ended.is_set():
            if "reward_asked" in asked:
                context.events.say(cost_line(asked))
            return
        clock, busy, sampled = now, now_busy, total


async def push_events(context: Context) -> None:
    """Keep the storage's copy of the events a few seconds behind, a long run's a minute or two, until cancelled. What
    fails is tried again."""
    log = context.run_dir / "events.jsonl"
    while True:
        size = log.stat().st_size if log.exists() else 0
        await asyncio.sleep(max(EVERY, size / PUSHED_PER_S))
        try:
            await asyncio.to_thread(push_logs, context.storage, context.run_dir)
        except RunError as error:
            context.events.say(str(error))


async def counts(context: Context) -> dict[str, int]:
    """Hits and misses of the reference's cache, texts embedded and truncated, what a reward behind HTTP was asked,
    since the run began."""
    fleet = context.fleet
    reference = await gather(*(one.counts.remote() for one in [*fleet.reference, *fleet.desks.values()]))
    embedder = await gather(*(one.counts.remote() for one in fleet.embedder))
    scorers = [one for key, replicas in fleet.rewards.items() if key.startswith("reward") for one in replicas]
    service = await gather(*(one.cost.remote() for one in scorers))
    costs = dict.fromkeys(key for one in service for key in one)  # a part of a sum may cost nothing
    return {
        **{f"reward_{key}": sum(one.get(key, 0) for one in service) for key in costs},
        **{f"reference_{key}": sum(one[key] for one in reference) for key in (reference or [{}])[0]},
        **{key: sum(one[key] for one in embedder) for key in (embedder or [{}])[0]},
    }


def cost_line(asked: Mapping[str, int]) -> str:
    """What a reward behind HTTP cost, from `counts`."""
    names = ("asked", "cached", "failed", "requests", "prompt_tokens", "completion_tokens")
    answers, cached, failed, requests, read, written = (asked[f"reward_{name}"] for name in names)
    tokens = f", {read:,} tokens read and {written:,} written" if read or written else ""
    known = f"{cached:,} known, {failed:,} without a score"
    return f"reward: {answers:,} answers scored ({known}) in {requests:,} requests{tokens}"


async def busy_seconds(context: Context) -> dict[Any, float]:
    """Seconds that each generator of the pool has worked since it started; one that is lost meanwhile is left out."""
    return await _of_each(context, lambda generator: generator.busy_seconds.remote())


async def gpu_use(context: Context) -> dict[Any, GpuUse]:
    """What each generator's GPUs did since it started; one that is lost meanwhile is left out."""
    return await _of_each(context, lambda generator: generator.gpu_use.remote())


async def _of_each(context: Context, question: Callable[[Any], Any]) -> dict[Any, Any]:
    answers: dict[Any, Any] = {}

    async def one(generator: Any) -> None:
        with contextlib.suppress(LostError):
            answers[generator] = await ask(question(generator))

    await asyncio.gather(*map(one, context.pool.generators))
    return answers


def busy_share(before: Mapping[Any, float], after: Mapping[Any, float], seconds: float) -> float:
    """Mean share of `seconds` in which a generator worked that was there before and after; 0 without any.

    One that was started again in between counts from there.
    """
    shares = [max(0.0, busy - before[one]) / seconds for one, busy in after.items() if one in before]
    return min(1.0, sum(shares) / len(shares)) if shares else 0.0


def memory() -> dict[str, float]:
    """MiB that this process holds, and that the cluster's object store does."""
    total, free = (r.get("object_store_memory", 0.0) for r in (ray.cluster_resources(), ray.available_resources()))
    return {
        "resident_mib": psutil.Process().memory_info().rss / 2**20,
        "object_store_mib": (total - free) / 2**20,
    }
