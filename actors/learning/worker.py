"""What one worker of a learner does: take a part, update, save, publish, acknowledge; until the channel closes.

Every worker sees every part and takes its share of an update's groups; what they do with gradients and weights is the
strategy's (`actors.learning.strategy`), and the result does not depend on how many workers there are. Rank 0 leases,
writes and publishes; what the strategy must gather for that, all workers gather together.
"""

import math
import random
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from actors.channel import Box, Lease
from actors.learning.make_strategy import make_strategy
from actors.learning.objectives import build_objective
from actors.learning.policy import LearnedPolicy, probe_logps
from actors.learning.strategy import micro_batches
from actors.metrics import LEARNER_LOSS, LEARNER_SAMPLES, LEARNER_SECONDS, LEARNER_UPDATES
from plumbline.config.data import Model
from plumbline.config.learner import Learner, LoraPolicy
from plumbline.config.pipelines import Pipeline, Ple
from plumbline.config.section import planned
from plumbline.errors import LossError, PlumblineError, RunError
from plumbline.models.backend import set_up_torch
from plumbline.records import PolicyRef, Publication, Sample, TokenGroup
from plumbline.runs.checkpoint import MARKER, checkpoint_directory, latest_step, load_checkpoint, save_checkpoint
from plumbline.runs.mirror import pull_parts, push_checkpoint, saved_step
from plumbline.runs.policies import PROOF, read_publication, version_directory
from plumbline.runs.storage import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """All that a learner needs; picklable. `total` counts parts, checkpoints and versions go into `run_dir`.

    `publishes`: every version as an adapter that generators take, or as a whole model that they take (`full`), or one
    whole model at the end, for nobody (`final`). `storage`: the URL of the copy of `run_dir`, where there is one.
    """

    section: Pipeline
    model: Model
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    probe: tuple[TokenGroup, ...]
    total: int
    seed: int
    run_dir: Path
    publishes: Literal["adapter", "full", "final"]
    storage: str | None = None

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints" / self.section.name

    def saved_step(self) -> int:
        """Where it goes on: the step of the newest checkpoint, 0 for none."""
        return saved_step(Storage(self.run_dir, self.storage), self.checkpoints)


class Feed(Protocol):
    """Where parts come from and where versions go; the calls of a channel and a policy store, made blocking."""

    def attach(self, holder: str, done: int) -> None: ...

    def lease(self, holder: str) -> Lease | None: ...

    def peek(self, step: int) -> Box: ...

    def read(self, box: Box) -> list[Sample]: ...

    def ack(self, step: int, holder: str) -> None: ...

    def publish(self, publication: Publication) -> None: ...

    def fail(self, policy: str, error: PlumblineError) -> None: ...


def train(spec: LearnerSpec, feed: Feed, rank: int, world: int) -> None:
    """Train until the channel closes.

    A failure that trying again would not mend, such as a loss that is not finite (LossError), is told to whoever waits
    by `feed.fail`, and ends the training without raising: Ray Train would only start it again.
    """
    try:
        Worker(spec, feed, rank, world).run()
    except PlumblineError as error:
        feed.fail(spec.section.name, error)
    except Exception as error:
        if not lost_peer(error):
            feed.fail(spec.section.name, RunError(f"the learner of {spec.section.name} failed: {error!r}"))
        raise


def lost_peer(error: Exception) -> bool:
    """Whether another worker went away in the middle of an exchange; Ray Train then starts all of them anew."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def count_part(pipeline: str, metrics: Mapping[str, float], updates: int, samples: int, seconds: float) -> None:
    """A part that was trained on, for Prometheus."""
    LEARNER_UPDATES.inc(updates, pipeline=pipeline)
    LEARNER_SAMPLES.inc(samples, pipeline=pipeline)
    LEARNER_SECONDS.observe(seconds, pipeline=pipeline)
    if "loss" in metrics:
        LEARNER_LOSS.set(metrics["loss"], pipeline=pipeline)


class Worker:
    """The state of one worker: strategy, counters, what the last part gave."""

    def __init__(self, spec: LearnerSpec, feed: Feed, rank: int, world: int) -> None:
        set_up_torch(planned(spec.section.learner.cpus))
        torch.manual_seed(spec.seed)
        random.seed(spec.seed)
        self._spec, self._feed, self._rank, self._world = spec, feed, rank, world
        self._settings: Learner = spec.section.learner
        self._through_adapter = isinstance(getattr(spec.section, "policy", None), LoraPolicy)
        self._storage = Storage(spec.run_dir, spec.storage)
        parts = spec.run_dir / "rollouts" / spec.section.name
        self._objective = build_objective(spec.section, parts, spec.seed)
        # The strategy moves it to the device: ZeRO 3 holds no whole model there.
        self._policy = LearnedPolicy(spec.section, spec.model, spec.dtype, "cpu", spec.seed)
        self._strategy = make_strategy(self._policy, self._settings, spec.dtype, spec.device, world)
        self._updates = 0
        self._done = spec.saved_step()
        self._base_probe = self._measure()
        self._probe = self._previous_probe = self._base_probe
        self._metrics: dict[str, float] = {}
        if self._done:
            if isinstance(spec.section, Ple):  # it replays what was trained on, perhaps on another machine
                pull_parts(self._storage, spec.run_dir, parts)
            self._restore()
        self._objective.restore(self._done)

    def run(self) -> None:
        """Take parts until there are no more."""
        holder = uuid.uuid4().hex
        if self._done:  # died between saving and publishing, or the whole run was resumed
            self._publish()
        if self._rank == 0:
            self._feed.attach(holder, self._done)
        every = self._settings.checkpoint_every or (50 if self._spec.publishes == "final" else 1)
        waited = time.monotonic()
        for step, samples in self._parts(holder):
            started = time.monotonic()
            self._metrics = self._train_on(step, samples)
            self._previous_probe, self._probe = self._probe, self._measure()
            self._done = step
            self._metrics |= {"learner_wait_s": started - waited, "learner_work_s": time.monotonic() - started}
            saved = step % every == 0 or step == self._spec.total
            if saved:
                self._save()
            self._publish()
            if saved and self._rank == 0:
                self._feed.ack(step, holder)
            waited = time.monotonic()

    def _parts(self, holder: str) -> Iterator[tuple[int, list[Sample]]]:
        """Parts in order, the same on all workers: rank 0 leases, the others are told the step."""
        while True:
            lease = self._feed.lease(holder) if self._rank == 0 else None
            step = lease.step if lease else 0
            if self._world > 1:
                told = torch.tensor([step], device=self._spec.device)
                dist.broadcast(told, src=0)
                step = int(told)
            if step == 0:
                return
            samples = self._feed.read(lease.box if lease else self._feed.peek(step))
            if self._world > 1:
                dist.barrier()  # a part without an update would else be acknowledged before all have read it
            yield step, samples

    def _train_on(self, step: int, samples: Sequence[Sample]) -> dict[str, float]:
        """All updates of one part; metrics are means over its updates, weighted by samples."""
        sums: dict[str, float] = {}
        count = 0
        norms: list[float] = []
        started = time.monotonic()
        for batch in self._objective.updates(step, samples):
            norms.append(self._update(step, batch, sums))
            count += len(batch)
        metrics = {key: value / count for key, value in self._gathered(sums).items()} if count else {}
        metrics |= self._objective.figures()
        if self._rank == 0:
            count_part(self._spec.section.name, metrics, len(norms), count, time.monotonic() - started)
        return metrics | {
            "updates": float(len(norms)),
            "grad_norm": sum(norms) / len(norms) if norms else 0.0,
            "lr": self._lr(step),
        }

    def _update(self, step: int, batch: Sequence[Sample], sums: dict[str, float]) -> float:
        """One optimiser step over `batch`; adds its metrics to `sums`. Returns the gradient's norm."""
        micros = micro_batches(batch, self._world, self._rank, self._settings.micro_tokens)
        self._updates += 1
        update = self._strategy.update(self._objective.loss, micros, self._lr(step))
        for micro, (loss, metrics) in zip(micros, update.results, strict=True):
            if not math.isfinite(loss.item()):
                raise LossError(self._failure(step, f"the loss became {loss.item()}"))
            for key, value in {"loss": loss, **metrics}.items():
                sums[key] = sums.get(key, 0.0) + float(value) * micro.share * len(batch)
        if not math.isfinite(update.grad_norm):  # on all workers, where one of them had such a loss
            raise LossError(self._failure(step, f"the gradient became {update.grad_norm}"))
        return update.grad_norm

    def _failure(self, step: int, what: str) -> str:
        saved = latest_step(self._spec.checkpoints)
        kept = f"the checkpoint of step {saved} is saved" if saved else "no step was saved yet"
        return f"{self._spec.section.name}: {what} in step {step}; {kept} in {self._spec.checkpoints}; try a lower lr"

    def _lr(self, step: int) -> float:
        """Linear warm-up by optimiser steps, then constant, or a cosine over the parts."""
        s = self._settings
        warm = min(1.0, self._updates / s.warmup) if s.warmup else 1.0
        decay = 0.5 * (1 + math.cos(math.pi * (step - 1) / self._spec.total)) if s.schedule == "cosine" else 1.0
        return s.lr * warm * decay

    def _gathered(self, sums: dict[str, float]) -> dict[str, float]:
        if self._world == 1:
            return sums
        everyone: list[Any] = [None] * self._world
        dist.all_gather_object(everyone, sums)
        return {key: sum(one.get(key, 0.0) for one in everyone) for key in {k for one in everyone for k in one}}

    def _measure(self) -> list[float]:
        """The probe under the present weights; all workers together."""
        return self._strategy.forward(lambda model: probe_logps(model, self._spec.probe, self._settings.micro_tokens))

    def _save(self) -> None:
        tensors = self._strategy.state()
        if self._rank != 0:
            return
        tensors["rng.torch"] = torch.get_rng_state()
        if self._spec.device == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        meta = {"updates": self._updates, "previous_probe": self._previous_probe, "metrics": self._metrics}
        save_checkpoint(self._spec.checkpoints, self._done, tensors, meta)
        push_checkpoint(self._storage, self._spec.checkpoints, self._done)

    def _restore(self) -> None:
        self._storage.pull_directory(checkpoint_directory(self._spec.checkpoints, self._done), MARKER)
        tensors, meta = load_checkpoint(self._spec.checkpoints, self._done)
        self._strategy.load(tensors)
        torch.set_rng_state(tensors["rng.torch"])
        if self._spec.device == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        self._updates = int(meta["updates"])
        self._metrics = meta["metrics"]
        self._previous_probe = meta["previous_probe"]
        self._probe = self._measure()

    def _publish(self) -> None:
        """Write the version to the run directory and hand it to the store."""
        publication = Publication(
            ref=PolicyRef(policy=self._spec.section.name, version=self._done),
            files={},
            probe_logps=self._probe,
            previous_probe_logps=self._previous_probe,
            base_probe_logps=self._base_probe,
            metrics=self._metrics,
        )
        served = self._spec.publishes != "final"
        written = served or self._done == self._spec.total
        weights = self._strategy.weights(trainable=self._through_adapter) if written else {}
        if self._rank != 0:
            return
        if written:
            directory = version_directory(self._spec.run_dir, publication.ref)
            self._policy.save(directory, publication, weights, adapter=self._spec.publishes == "adapter")
            self._storage.push_directory(directory, PROOF)
            if served:
                publication = replace(read_publication(self._spec.run_dir, publication.ref), metrics=self._metrics)
        self._feed.publish(publication)
