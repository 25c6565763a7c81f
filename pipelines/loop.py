"""The stages that every method shares. A run of a method (`Method`) is three coroutines and a learner:

    produce:  draw -> generate -> score -> commit -> channel       (one task a step, as many at once as there are slots)
    learner:                                         channel -> train -> publish    (`actors.learning.learner`)
    advance:                                                             publish -> prove -> release the step's slot

`produce` waits for a slot, `advance` gives it back once every generator has proved the version that the step made. The
number of slots is therefore the bound on staleness: with ``max_staleness + 1`` of them, step t is drawn only when
version ``t - 1 - max_staleness`` or a newer one is served. A method that draws from π0 has no staleness; its slots
bound how far generation runs ahead of the learner, and its later epochs read the parts again.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from actors.channel import Box
from actors.gpu import mean_use
from actors.learning.worker import LearnerSpec
from actors.spawn import ask, start_learner
from pipelines.context import Context
from pipelines.method import Method, Rollout
from pipelines.monitor import busy_seconds, busy_share, gpu_use, memory
from plumbline.config.pipelines import MethodSection, Pipeline
from plumbline.errors import LostError, RunError
from plumbline.records import PolicyRef, Sample
from plumbline.runs.mirror import prune_versions
from plumbline.runs.policies import PROOF, version_directory

LEARNER_ENDS_S = 600
"""Seconds that a learner may take to end once its channel has failed: it ends its start, or the update it is at."""


@dataclass(slots=True)
class Progress:
    """Where a method stands: it goes on after step `resumed`, of which `logged` have their event; `proved` is the
    version that all generators serve; `undrawn` parts will still be asked of them. `tokens` and `described` are what
    steps that are under way sampled, and what their parts say of themselves."""

    resumed: int
    logged: int
    proved: int
    undrawn: int
    tokens: dict[int, int] = field(default_factory=dict)
    described: dict[int, dict[str, float]] = field(default_factory=dict)


async def run_method(context: Context, method: Method, section: MethodSection) -> None:
    """Run a method from where its checkpoints stand to its last step.

    Raises:
        SyncError: a version did not arrive at a generator.
        LossError: the loss became NaN or infinite.
        RunError: the learner or an actor ended beyond repair.
    """
    if not section.trains:
        method.rejected.keep_steps(method.parts.steps())
        await make_parts(context, method)
        return
    spec = context.learner_spec(section, method.total, serves=True)
    await mended(context, section, lambda: make_and_learn(context, method, spec))


async def mended(context: Context, section: Pipeline, attempt: Callable[[], Awaitable[None]]) -> None:
    """Make an `attempt`, which goes on from the newest checkpoint; and again, where a process was lost that holds what
    is under way: a channel, a desk, the policy store, Ray Train's controller, or the process that started that.

    Raises:
        LostError: `max_failures` were not enough.
    """
    for left in range(section.learner.max_failures, -1, -1):
        try:
            return await attempt()
        except LostError as error:
            if not left:
                raise
            context.events.say(f"{section.name} goes on from its newest checkpoint: {error}")
            await context.fleet.restored()


async def make_and_learn(context: Context, method: Method, spec: LearnerSpec) -> None:
    """From where a method's checkpoints stand to its last step; see `run_method`."""
    await asyncio.gather(*method.commits, return_exceptions=True)  # of an attempt before this one
    method.rejected.keep_steps(method.parts.steps())
    done = await asyncio.to_thread(spec.saved_step)
    logged = context.events.keep(method.name, done)
    undrawn = method.part_count - len(method.parts.steps())
    progress = Progress(resumed=done, logged=logged, proved=done, undrawn=undrawn)
    if progress.logged >= method.total:
        return
    channel = context.fleet.add_channel(method.slots, method.name, done)
    desk = context.fleet.add_desk(method.name) if spec.frozen else None
    learner = start_learner(context.fleet, spec, channel, desk)
    stages = (produce(context, method, channel, progress), advance(context, method, channel, progress))
    await beside_learner(learner, [one for one in (channel, desk) if one], *stages)


async def beside_learner(learner: "asyncio.Future[None]", asked: Sequence[Any], *stages: Any) -> None:
    """Run a learner and the stages that feed it; see `first_of`.

    The other pipelines of the run go on: where this one ends early, its learner must not wait for what never comes.

    Args:
        asked: the actors that the learner waits for.
    """
    try:
        await first_of(learner, *stages)
    except Exception as error:
        kind = LostError if isinstance(error, LostError) else RunError
        for one in asked:
            with contextlib.suppress(RunError):  # it may be what was lost
                await ask(one.fail.remote(kind(f"the pipeline has ended: {error}")))
        # Whoever tries again starts another, and there are never two.
        if isinstance(error, LostError) and not (await asyncio.wait([learner], timeout=LEARNER_ENDS_S))[0]:
            raise RunError(f"its learner did not end after this: {error}") from None
        raise


async def make_parts(context: Context, method: Method) -> None:
    """Only generate: all parts that are not there yet, as many at once as there are slots."""
    slots = asyncio.Semaphore(method.slots)
    committed = method.parts.steps()
    context.events.keep(method.name, max(committed, default=0))
    left = [part for part in range(1, method.part_count + 1) if part not in committed]
    started = time.monotonic()

    async def one(part: int) -> None:
        async with slots:
            rollout = await method.roll_out(part, method.ref(0))
            await commit(context, method, part, rollout)
            left.remove(part)
            seconds = time.monotonic() - started
            made = method.part_count - len(committed) - len(left)
            context.events.write(
                {
                    "pipeline": method.name,
                    "step": part,
                    "steps": method.part_count,
                    **method.describe(rollout.rows),
                    "rejected": len(rollout.rejected),
                    "elapsed": seconds,
                    "tokens_per_s": rollout.tokens * made / seconds,
                    "seconds_left": seconds / made * len(left),
                }
            )

    async with asyncio.TaskGroup() as parts:
        for part in list(left):
            parts.create_task(one(part))


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


def first_failure(error: BaseException) -> BaseException:
    """The first failure inside nested groups; one that is no group is itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def produce(context: Context, method: Method, channel: Any, progress: Progress) -> None:
    """Consumes prompts and slots; produces parts and, through the channel, boxed samples. Waits for slots."""
    if progress.resumed and not (method.displaces_base and progress.undrawn):
        await prove_everywhere(context, PolicyRef(policy=method.name, version=progress.resumed))
    committed = set(method.parts.steps())
    drawn: dict[int, asyncio.Task[None]] = {}  # those that are under way

    async def draw(part: int, ref: PolicyRef) -> None:
        rollout = await method.roll_out(part, ref)
        await commit(context, method, part, rollout)
        progress.tokens[part] = rollout.tokens
        progress.undrawn -= 1
        committed.add(part)
        del drawn[part]

    async def one(step: int, part: int) -> None:
        if part in drawn:
            await drawn[part]
        rows = await asyncio.to_thread(method.parts.read, part)
        progress.described[step] = method.describe(rows)
        await ask(channel.put.remote(step, Box(ref=ray.put(method.samples(rows)))))

    async with asyncio.TaskGroup() as steps:
        for step in range(progress.resumed + 1, method.total + 1):
            await ask(channel.reserve.remote())
            part = method.part(step)
            if part not in committed and part not in drawn:
                drawn[part] = steps.create_task(draw(part, method.ref(progress.proved)))
            steps.create_task(one(step, part))
    await ask(channel.close.remote())


async def commit(context: Context, method: Method, part: int, rollout: Rollout) -> None:
    """The one write of a part, which is not interrupted once it has begun.

    The part comes last, here and in the storage: rejected rows without their part are dropped on resume.
    """
    writing = asyncio.create_task(_write(context, method, part, rollout))
    method.commits.add(writing)
    writing.add_done_callback(method.commits.discard)
    await asyncio.shield(writing)


async def _write(context: Context, method: Method, part: int, rollout: Rollout) -> None:
    if rollout.rejected:
        await asyncio.to_thread(method.rejected.add, part, rollout.rejected)
    await asyncio.to_thread(method.parts.write, part, rollout.rows)
    files = [method.rejected.path(part)] if rollout.rejected else []
    await asyncio.to_thread(context.storage.push, *map(Path, [*files, method.parts.path(part)]))


async def advance(context: Context, method: Method, channel: Any, progress: Progress) -> None:
    """Consumes published versions; produces proofs, free slots and events. Waits for the learner.

    It begins at the first step without an event: those that were saved just before an interruption get theirs now.
    """
    for step in range(progress.logged + 1, progress.resumed):
        # The learner publishes the newest checkpoint's version alone: of those before it, the parts are what is known.
        context.events.write(await step_event(method, step, {}, None))
    started = clock = time.monotonic()
    busy, gpus = await busy_seconds(context), await gpu_use(context)
    first = max(progress.logged + 1, progress.resumed)
    for step in range(first, method.total + 1):
        ref = PolicyRef(policy=method.name, version=step)
        publication = await ask(context.fleet.store.wait.remote(ref))
        # Whole weights would take π0's place, which is still being drawn from: they are proved once it no longer is.
        later = method.displaces_base and progress.undrawn > 0
        proofs = [] if later else await prove_everywhere(context, ref)
        progress.proved = max(step, progress.proved)
        if step > progress.resumed:
            await ask(channel.release.remote())
        now, now_busy, now_gpus = time.monotonic(), await busy_seconds(context), await gpu_use(context)
        seconds = now - clock
        metrics = publication.metrics
        tell_skipped(context, method.name, step, metrics)
        wait, work = metrics.get("learner_wait_s", 0.0), metrics.get("learner_work_s", 0.0)
        context.events.write(
            {
                **await step_event(method, step, metrics, progress.described.pop(step, None)),
                "proof_difference": max((p.difference for p in proofs), default=0.0),
                "proof_drift": min((p.drift for p in proofs), default=0.0),
                "seconds": seconds,
                "tokens_per_s": progress.tokens.pop(step, 0) / seconds,
                "generator_idle": 1 - busy_share(busy, now_busy, seconds),
                "learner_idle": wait / max(wait + work, 1e-9),
                **{f"generator_{key}": value for key, value in mean_use(gpus, now_gpus).items()},
                "seconds_left": (now - started) / (step - first + 1) * (method.total - step),
                **memory(),
            }
        )
        if context.promoter and not later:  # without any generator, the first that joins proves it
            await asyncio.to_thread(context.storage.pull_directory, version_directory(context.run_dir, ref), PROOF)
            context.promoter.offer(ref, last=step == method.total)
        await prune(context, method.name, method.keep_versions, step)
        clock, busy, gpus = now, now_busy, now_gpus


async def prune(context: Context, policy: str, keep: int | None, step: int) -> None:
    """Consumes old versions on disk, now that the run has come to the one of `step`. The newest `keep` stay (None:
    all), those that rollouts may ask for, and those that the promoter looks at."""
    if keep is not None:
        used = context.promoter.looks_at(policy) if context.promoter else set()
        keep = max(keep, context.config.kept_versions)
        await asyncio.to_thread(prune_versions, context.storage, context.run_dir, policy, step, keep, used)


async def step_event(
    method: Method, step: int, metrics: Mapping[str, float], described: Mapping[str, float] | None
) -> dict[str, Any]:
    """What a step's event says of its part, beside the learner's `metrics`; read anew where none has `described` it."""
    part = method.part(step)
    if described is None:
        described = method.describe(await asyncio.to_thread(method.parts.read, part))
    return {
        "pipeline": method.name,
        "step": step,
        "steps": method.total,
        **metrics,
        **described,
        "rejected": method.rejected.count(part),
    }


def tell_skipped(context: Context, pipeline: str, step: int, metrics: Mapping[str, float]) -> None:
    """A line on the screen where a step's optimiser steps were left out; its event has their number."""
    if skipped := metrics.get("skipped_updates"):
        of = skipped + metrics["updates"]
        context.events.say(
            f"{pipeline}: step {step} left out {skipped:g} of {of:g} optimiser steps, whose loss or gradient was not "
            "finite; the weights are as they were before"
        )


async def prove_everywhere(context: Context, ref: PolicyRef) -> list[Any]:
    """Load a published version into every generator of the pool, now; who joins later proves it first.

    Returns:
        Their proofs, without those that were lost over it.

    Raises:
        SyncError: the version did not arrive.
    """
    await ask(context.fleet.store.wait.remote(ref))
    pool = context.pool
    current = pool.current.get(ref.policy)
    if current is None or current.version < ref.version:
        pool.current[ref.policy] = ref

    async def one(generator: Any) -> Any:
        try:
            with pool.hold(generator):
                return await ask(generator.load.remote(ref))
        except LostError:
            pool.lose(generator)

    proofs = await asyncio.gather(*map(one, pool.generators))
    return [proof for proof in proofs if proof is not None]


async def train_on(
    context: Context,
    spec: LearnerSpec,
    batches: Sequence[Sequence[Sample]],
    begun: Callable[[], None] = lambda: None,
) -> None:
    """Train on data that is already there, a batch a step: `sft`, `reward`. Resumes where its checkpoint stands.

    Args:
        begun: called after the first step, when all workers have their places.
    """
    await mended(context, spec.section, lambda: learn_from(context, spec, batches, begun))


async def learn_from(
    context: Context, spec: LearnerSpec, batches: Sequence[Sequence[Sample]], begun: Callable[[], None]
) -> None:
    """From where its checkpoint stands to the last batch; see `train_on`."""
    done, name = await asyncio.to_thread(spec.saved_step), spec.section.name
    context.events.keep(name, done)
    if done >= len(batches):
        return
    channel = context.fleet.add_channel(slots=8, learner=name, done=done)
    learner = start_learner(context.fleet, spec, channel)

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
            tell_skipped(context, name, step, publication.metrics)
            await prune(context, name, spec.section.keep_versions, step)
            if step == done + 1:
                begun()
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

    await beside_learner(learner, [channel], feed(), follow())
