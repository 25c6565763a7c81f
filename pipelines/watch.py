"""What a run sees of the machinery that its pipelines share: how busy the pool is, who had it, what the caches gave."""

import asyncio
import contextlib
import time

import psutil
import ray

from actors.spawn import gather
from pipelines.context import Context

EVERY = 5.0
"""Seconds between two lines of the pool."""


async def watch_pool(context: Context, ended: asyncio.Event) -> None:
    """Write a line of the pool now and then, and a last one once `ended` is set: its totals are the whole run's."""
    clock, busy, sampled = time.monotonic(), 0.0, 0
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), EVERY)
        pool, now, now_busy = context.pool, time.monotonic(), await busy_seconds(context)
        total = sum(account.sampled for account in pool.accounts.values())
        context.events.write(
            {
                "pipeline": "pool",
                "tokens_per_s": (total - sampled) / (now - clock),
                "queue": pool.queue,
                "utilisation": min(1.0, (now_busy - busy) / (now - clock)),
                "shares": pool.shares(),
                "longest_waits": {name: account.longest_wait for name, account in pool.accounts.items()},
                **await counts(context),
            }
        )
        if ended.is_set():
            return
        clock, busy, sampled = now, now_busy, total


async def counts(context: Context) -> dict[str, int]:
    """Hits and misses of the reference's cache, texts embedded and truncated, since the run began."""
    fleet = context.fleet
    reference = await gather(*(one.counts.remote() for one in fleet.reference))
    embedder = await gather(*(one.counts.remote() for one in fleet.embedder))
    return {
        **{f"reference_{key}": sum(one[key] for one in reference) for key in (reference or [{}])[0]},
        **{key: sum(one[key] for one in embedder) for key in (embedder or [{}])[0]},
    }


async def busy_seconds(context: Context) -> float:
    """Mean seconds that a generator has worked since it started."""
    seconds = await gather(*(g.busy_seconds.remote() for g in context.fleet.generators))
    return sum(seconds) / max(len(seconds), 1)


def memory() -> dict[str, float]:
    """MiB that this process holds, and that the cluster's object store does."""
    total, free = (r.get("object_store_memory", 0.0) for r in (ray.cluster_resources(), ray.available_resources()))
    return {
        "resident_mib": psutil.Process().memory_info().rss / 2**20,
        "object_store_mib": (total - free) / 2**20,
    }
