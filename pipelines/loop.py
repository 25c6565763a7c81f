"""The stages that every method shares. A run of a method is three coroutines and a learner:

    produce:  draw -> generate -> score -> commit -> channel       (one task a step, as many at once as there are slots)
    learner:                                         channel -> train -> publish    (a process, `actors.learner`)
    advance:                                                             publish -> prove -> release the step's slot

`produce` waits for a slot, `advance` gives it back once every generator has proved the version that the step made. The
number of slots is therefore the bound on staleness: with ``max_staleness + 1`` of them, step t is drawn only when
version ``t - 1 - max_staleness`` or a newer one is served. What a method draws, scores and keeps is its `Method`.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import psutil
import ray

from actors.channel import Box
from actors.spawn import ask, gather, start_learner
from actors.train_loop import LearnerSpec
from pipelines.context import Context
from plumbline.checkpoint import latest_step
from plumbline.errors import RunError
from plumbline.parts import Parts, Rejected
from plumbline.records import PolicyRef, Sample

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What one step drew: rows for its part, rows for `rejected.parquet`, and how many tokens were sampled."""

    rows: list[dict[str, object]]
    rejected: list[dict[str, object]]
    tokens: int


class Method(Protocol):
    """What differs between methods, seen from the loop."""

    @property
    def name(self) -> str: ...

    @property
    def total(self) -> int:
        """Number of steps."""
        ...

    @property
    def slots(self) -> int:
        """Steps that may be between draw and proof."""
        ...

    @property
    def parts(self) -> Parts: ...

    @property
    def rejected(self) -> Rejected: ...

    async def roll_out(self, step: int, ref: PolicyRef) -> Rollout:
        """Draw the step's prompts, generate from `ref`, score."""
        ...

    def sample(self, row: Row) -> Sample:
        """The training example in a row of a part."""
        ...

    def describe(self, rows: Sequence[Row]) -> dict[str, float]:
        """Figures of a committed part, for its event."""
        ...


@dataclass(slots=True)
class Progress:
    """Where a method stands: it goes on after step `resumed`, of which `logged` have their event; `proved` is the
    version that all generators serve."""

    resumed: int
    logged: int
    proved: int
    tokens: dict[int, int] = field(default_factory=dict)


async def run_method(context: Context, method: Method, spec: LearnerSpec) -> None:
    """Run a method from where its checkpoints stand to its last step.

    Raises:
        SyncError: a version did not arrive at a generator.
        LossError: the loss became NaN or infinite.
        RunError: the learner or an actor ended beyond repair.
    """
    done = latest_step(spec.checkpoints)
    progress = Progress(resumed=done, logged=context.events.keep(method.name, done), proved=done)
    method.rejected.keep_steps(method.parts.steps())
    if progress.logged >= method.total:
        return
    channel = context.fleet.add_channel(method.slots)
    learner = start_learner(spec, channel, context.fleet.store)
    await first_of(
        learner,
        produce(context, method, channel, progress),
        advance(context, method, channel, progress),
    )


async def first_of(learner: "asyncio.Future[None]", *stages: Any) -> None:
    """Run the stages and the learner to their ends; the first failure cancels the rest and is raised.

    A stage's own error says more than the learner's end that followed from it, so it is raised where there are both.
    """
    tasks = [asyncio.ensure_future(stage) for stage in stages]
    try:
        await asyncio.wait([*tasks, learner], return_when=asyncio.FIRST_EXCEPTION)
        for ended in (task for task in (*tasks, learner) if task.done()):
            ended.result()
    except BaseExceptionGroup as group:
        raise first_failure(group) from None
    finally:
        for task in tasks:
            task.cancel()


def first_failure(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first failure inside nested groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def produce(context: Context, method: Method, channel: Any, progress: Progress) -> None:
    """Consumes prompts and slots; produces parts and, through the channel, boxed samples. Waits for slots."""
    if progress.resumed:
        await prove_everywhere(context, PolicyRef(policy=method.name, version=progress.resumed))
    committed = set(method.parts.steps())

    async def one(step: int, ref: PolicyRef) -> None:
        if step not in committed:
            await commit(method, step, await method.roll_out(step, ref), progress)
        samples = [method.sample(row) for row in await asyncio.to_thread(method.parts.read, step)]
        await ask(channel.put.remote(step, Box(ref=ray.put(samples))))

    async with asyncio.TaskGroup() as steps:
        for step in range(progress.resumed + 1, method.total + 1):
            await ask(channel.reserve.remote())
            steps.create_task(one(step, PolicyRef(policy=method.name, version=progress.proved)))
    await ask(channel.close.remote())


async def commit(method: Method, step: int, rollout: Rollout, progress: Progress) -> None:
    """The one write of a step. The part comes last: rejected rows without their part are dropped on resume."""
    if rollout.rejected:
        await asyncio.to_thread(method.rejected.add, step, rollout.rejected)
    await asyncio.to_thread(method.parts.write, step, rollout.rows)
    progress.tokens[step] = rollout.tokens


async def advance(context: Context, method: Method, channel: Any, progress: Progress) -> None:
    """Consumes published versions; produces proofs, free slots and events. Waits for the learner.

    It begins at the first step without an event: one that was saved just before an interruption gets its own now.
    """
    started = clock = time.monotonic()
    busy = await busy_seconds(context)
    for step in range(progress.logged + 1, method.total + 1):
        ref = PolicyRef(policy=method.name, version=step)
        publication = await ask(context.fleet.store.wait.remote(ref))
        proofs = await prove_everywhere(context, ref)
        progress.proved = max(step, progress.proved)
        if step > progress.resumed:
            await ask(channel.release.remote())
        now, now_busy = time.monotonic(), await busy_seconds(context)
        seconds = now - clock
        metrics = dict(publication.metrics)
        wait, work = metrics.pop("learner_wait_s", 0.0), metrics.pop("learner_work_s", 0.0)
        rows = await asyncio.to_thread(method.parts.read, step)
        context.events.write(
            {
                "pipeline": method.name,
                "step": step,
                "steps": method.total,
                **metrics,
                **method.describe(rows),
                "rejected": sum(row["step"] == step for row in method.rejected.rows()),
                "proof_difference": max((p.difference for p in proofs), default=0.0),
                "proof_drift": min((p.drift for p in proofs), default=0.0),
                "seconds": seconds,
                "tokens_per_s": progress.tokens.pop(step, 0) / seconds,
                "generator_idle": min(1.0, max(0.0, 1 - (now_busy - busy) / seconds)),
                "learner_idle": wait / max(wait + work, 1e-9),
                "seconds_left": (now - started) / (step - progress.logged) * (method.total - step),
                **memory(),
            }
        )
        clock, busy = now, now_busy


def memory() -> dict[str, float]:
    """MiB that this process holds, and that the cluster's object store does."""
    total, free = (r.get("object_store_memory", 0.0) for r in (ray.cluster_resources(), ray.available_resources()))
    return {
        "resident_mib": psutil.Process().memory_info().rss / 2**20,
        "object_store_mib": (total - free) / 2**20,
    }


async def prove_everywhere(context: Context, ref: PolicyRef) -> list[Any]:
    """Load a published version into every generator; returns their proofs. Raises SyncError."""
    await ask(context.fleet.store.wait.remote(ref))
    return await gather(*(g.load.remote(ref) for g in context.fleet.generators))


async def busy_seconds(context: Context) -> float:
    """Mean seconds that a generator has worked since it started."""
    seconds = await gather(*(g.busy_seconds.remote() for g in context.fleet.generators))
    return sum(seconds) / max(len(seconds), 1)


async def train_on(context: Context, spec: LearnerSpec, batches: Sequence[Sequence[Sample]]) -> None:
    """Train on data that is already there, a batch a step: `sft`, `reward`. Resumes where its checkpoint stands."""
    done, name = latest_step(spec.checkpoints), spec.section.name
    context.events.keep(name, done)
    if done >= len(batches):
        return
    channel = context.fleet.add_channel(slots=8)
    learner = start_learner(spec, channel, context.fleet.store)

    async def feed() -> None:
        for step in range(done + 1, len(batches) + 1):
            await ask(channel.reserve.remote())
            await ask(channel.put.remote(step, Box(ref=ray.put(list(batches[step - 1])))))
        await ask(channel.close.remote())

    async def follow() -> None:
        started = time.monotonic()
        for step in range(done + 1, len(batches) + 1):
            publication = await ask(context.fleet.store.wait.remote(PolicyRef(policy=name, version=step)))
            await ask(channel.release.remote())
            per_step = (time.monotonic() - started) / (step - done)
            context.events.write(
                {
                    "pipeline": name,
                    "step": step,
                    "steps": len(batches),
                    **publication.metrics,
                    "tokens_per_s": sum(s.group.tokens for s in batches[step - 1]) / per_step,
                    "seconds_left": per_step * (len(batches) - step),
                }
            )

    await first_of(learner, feed(), follow())


def batch_count(items: int, size: int) -> int:
    """Batches of at most `size` that hold `items`. Raises RunError where there is nothing."""
    if items == 0:
        raise RunError("no prompt is left to train on: all were rejected (see rejected.parquet)")
    return -(-items // size)
