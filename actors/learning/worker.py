"""What one worker of a learner does: take a part, update, save, publish, acknowledge; until the channel closes.

Every worker sees every part and takes its share of an update's groups; what they do with gradients and weights is the
strategy's (`actors.learning.strategy`), and the result does not depend on how many workers there are. Rank 0 leases
and publishes; what the strategy must gather for that, all workers gather together. Each writes its part of a
checkpoint.
"""

import math
import random
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from actors.channel import Lease
from actors.desk import Question
from actors.learning.feed import Feed
from actors.learning.frozen import Between, FrozenBase, FrozenSpec
from actors.learning.make_strategy import make_cut, make_strategy
from actors.learning.objectives import build_objective
from actors.learning.pace import Pace, count_part
from actors.learning.policy import LearnedPolicy, probe_logps
from actors.learning.resuming import lost_peer, newest_step
from actors.learning.sharing import shares_weights
from actors.learning.strategy import portion_of
from actors.metrics import LEARNER_WAIT
from plumbline.config.data import Model
from plumbline.config.learner import Learner, LoraPolicy
from plumbline.config.pipelines import Pipeline, Ple
from plumbline.config.section import planned
from plumbline.errors import ConfigError, LossError, LostError, PlumblineError, RunError
from plumbline.models.backend import set_up_torch
from plumbline.models.ipc import Shelf
from plumbline.models.loading import first_not_finite
from plumbline.records import PolicyRef, Publication, Sample, TokenGroup
from plumbline.runs.checkpoint import (
    Checkpoint,
    checkpoint_directory,
    latest_step,
    remove_old,
    whole,
    write_manifest,
    write_pieces,
)
from plumbline.runs.mirror import made_versions, pull_checkpoint, pull_parts, saved_step, settle_version
from plumbline.runs.mirror import seal_checkpoint as seal
from plumbline.runs.policies import PROOF, read_publication, version_directory, versions
from plumbline.runs.storage import Storage

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """All that a learner needs; picklable. `total` counts parts, checkpoints and versions go into `run_dir`.

    `publishes`: every version as an adapter that generators take, or as a whole model that they take (`full`), or one
    whole model at the end, for nobody (`final`). `storage`: the URL of the copy of `run_dir`, where there is one.
    `frozen`: which π0 it answers for, where a pipeline asks it.
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
    deterministic: bool = False
    storage: str | None = None
    frozen: FrozenSpec | None = None

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints" / self.section.name

    def saved_step(self) -> int:
        """Where it goes on: the step of the newest checkpoint, 0 for none."""
        return saved_step(Storage(self.run_dir, self.storage), self.checkpoints)


def train(spec: LearnerSpec, feed: Feed, rank: int, world: int) -> None:
    """Train until the channel closes.

    A failure that trying again would not mend, such as a loss that is not finite (LossError), is told to whoever waits
    by `feed.fail`, and ends the training without raising: Ray Train would only start it again.

    Raises:
        LostError: the channel, the desk or the store died. Nobody else is told: who started this starts another.
    """
    try:
        Worker(spec, feed, rank, world).run()
    except LostError:
        raise
    except PlumblineError as error:
        feed.fail(spec.section.name, error)
    except Exception as error:
        if not lost_peer(error):
            feed.fail(spec.section.name, RunError(f"the learner of {spec.section.name} failed: {error!r}"))
        raise


class Worker:
    """The state of one worker: strategy, counters, what the last part gave."""

    def __init__(self, spec: LearnerSpec, feed: Feed, rank: int, world: int) -> None:
        set_up_torch(planned(spec.section.learner.cpus), deterministic=spec.deterministic)
        torch.manual_seed(spec.seed)
        random.seed(spec.seed)
        self._spec, self._feed, self._rank, self._world = spec, feed, rank, world
        self._settings: Learner = spec.section.learner
        self._through_adapter = isinstance(getattr(spec.section, "policy", None), LoraPolicy)
        self._storage = Storage(spec.run_dir, spec.storage)
        parts = spec.run_dir / "rollouts" / spec.section.name
        self._objective = build_objective(spec.section, parts, spec.seed)
        # The strategy moves it to the device; with ZeRO 3 it is never whole, there or here. In 4 bits it is made there.
        cut = make_cut(self._settings, spec.device)
        device = spec.device if self._settings.quantize else "cpu"
        self._policy = LearnedPolicy(spec.section, spec.model, spec.dtype, device, spec.seed, cut)
        self._pace = Pace(self._policy.model, spec.device, world)
        self._strategy = make_strategy(self._policy, self._settings, spec.dtype, spec.device, world)
        shared = shares_weights(spec.section, spec.publishes, spec.device, self._policy.model, world)
        self._shelf = Shelf(torch.device(spec.device)) if shared else None
        asked = spec.frozen if rank == 0 else None
        self._frozen = FrozenBase(asked, self._policy.model, self._settings.micro_tokens) if asked else None
        self._holder = uuid.uuid4().hex
        self._answering_s = 0.0
        self._updates = 0
        self._skipped = 0  # in a row
        self._done = newest_step(spec, feed.acknowledged() if rank == 0 else 0, self._everyones)
        # A version that no checkpoint holds is made again, by other sums: under its number the first one stays.
        made = made_versions(self._storage, spec.run_dir, spec.section.name, self._done) if rank == 0 else set()
        self._made = self._everyones(made)[0]
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
        if self._done:  # died between saving and publishing, or the whole run was resumed
            self._publish()
        if self._rank == 0:
            self._feed.attach(self._holder, self._done)
        every = self._settings.checkpoint_every or (50 if self._spec.publishes == "final" else 1)
        waited = time.monotonic()
        for step, samples in self._parts():
            started, answered = time.monotonic(), self._answering_s
            if self._rank == 0:
                LEARNER_WAIT.inc(started - waited - answered, pipeline=self._spec.section.name)
            self._metrics = self._train_on(step, samples)
            self._refuse_damage(step)
            self._previous_probe, self._probe = self._probe, self._measure()
            self._done = step
            worked = time.monotonic() - started + answered
            self._metrics |= {"learner_wait_s": started - waited - answered, "learner_work_s": worked}
            saved = step % every == 0 or step == self._spec.total
            if saved:
                self._save()
            self._publish()
            if saved and self._rank == 0:
                self._feed.ack(step, self._holder)
            waited = time.monotonic()
        if self._rank == 0:
            self._feed.close(self._holder)

    def _parts(self) -> Iterator[tuple[int, list[Sample]]]:
        """Parts in order, the same on all workers: rank 0 leases, the others are told the step."""
        while True:
            lease = self._lease() if self._rank == 0 else None
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

    def _lease(self) -> Lease | None:
        """The next part; what is asked meanwhile is answered, for the part may be waiting for just that."""
        self._answering_s = 0.0
        while isinstance(found := self._feed.lease(self._holder), Question):
            started = time.monotonic()
            self._answer(found)
            self._answering_s += time.monotonic() - started
        return found

    def _answer(self, question: Question) -> None:
        assert self._frozen is not None
        answer, counts = self._frozen.answer(question)
        self._feed.answer(question.number, self._holder, answer, counts)

    def _answer_one(self) -> None:
        """Answer what is asked now, if anything is."""
        if self._frozen and (question := self._feed.question(self._holder)):
            self._answer(question)

    def _train_on(self, step: int, samples: Sequence[Sample]) -> dict[str, float]:
        """All updates of one part; metrics are means over its updates, weighted by samples."""
        sums: dict[str, float] = {}
        groups: list[TokenGroup] = []
        norms: list[float] = []
        skipped = 0
        started = time.monotonic()
        for batch in self._objective.updates(step, samples):
            norm = self._update(step, batch, sums)
            if norm is None:
                skipped += 1
                continue
            norms.append(norm)
            groups += [sample.group for sample in batch]
        seconds = time.monotonic() - started
        gathered = self._gathered(sums)
        metrics = {key: value / len(groups) for key, value in gathered.items()} if groups else {}
        metrics |= self._objective.figures()
        metrics |= {key: value / self._world for key, value in self._gathered(self._pace.gpu()).items()}
        metrics |= self._pace.figures(groups, seconds) if groups else {}
        metrics["updates"] = float(len(norms))
        if skipped:
            metrics["skipped_updates"] = float(skipped)
        if self._rank == 0:
            count_part(self._spec.section.name, metrics, groups, seconds)
        return metrics | {"grad_norm": sum(norms) / len(norms) if norms else 0.0, "lr": self._lr(step)}

    def _update(self, step: int, batch: Sequence[Sample], sums: dict[str, float]) -> float | None:
        """One optimiser step over `batch`; adds its metrics to `sums`. Returns the gradient's norm.

        None where that is no finite number, as on all workers where one of them has such a loss: then there was no
        step, and weights and optimiser are as they were.

        Raises:
            LossError: it happened more often in a row than `max_skipped`.
        """
        portion = portion_of(batch, self._world, self._rank, self._settings.micro_tokens)
        self._updates += 1
        update = self._strategy.update(Between(self._objective, self._answer_one), portion, self._lr(step))
        if not math.isfinite(update.grad_norm):
            self._updates -= 1
            self._skipped += 1
            if self._skipped > self._settings.max_skipped:
                losses = (f"the loss became {one.loss.item()}" for one in update.results if not one.loss.isfinite())
                what = next(losses, f"the gradient became {update.grad_norm}")
                times = f" in {self._skipped} optimiser steps in a row, the last" if self._skipped > 1 else ""
                raise LossError(self._failure(step, what + times))
            return None
        self._skipped = 0
        for result in update.results:
            for key, value in {"loss": result.loss, **result.metrics}.items():
                sums[key] = sums.get(key, 0.0) + float(value) * result.share * len(batch)
        return update.grad_norm

    def _refuse_damage(self, step: int) -> None:
        """Raise LossError where a weight is no finite number: it is neither saved nor published. All together."""
        name = first_not_finite(self._strategy.held().items())
        if self._world > 1:
            names: list[Any] = [None] * self._world
            dist.all_gather_object(names, name)
            name = next(filter(None, names), None)
        if name is not None:
            raise LossError(self._failure(step, f"{name} became NaN or infinite"))

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
        everyone = self._everyones(sums)
        return {key: sum(one.get(key, 0.0) for one in everyone) for key in {k for one in everyone for k in one}}

    def _everyones(self, value: T) -> list[T]:
        """What each worker has, by rank."""
        everyone: list[Any] = [value] * self._world
        if self._world > 1:
            dist.all_gather_object(everyone, value)
        return everyone

    def _measure(self) -> list[float]:
        """The probe under the present weights; all workers together."""
        return self._strategy.forward(lambda model: probe_logps(model, self._spec.probe, self._settings.micro_tokens))

    def _save(self) -> None:
        """Each worker writes its file, and pushes it; then rank 0 the manifest."""
        root = self._spec.checkpoints
        pieces = self._strategy.state()
        if self._rank == 0:
            pieces["rng.torch"] = whole(torch.get_rng_state())
            if self._spec.device == "cuda":
                pieces["rng.cuda"] = whole(torch.cuda.get_rng_state())
        mine = write_pieces(root, self._done, pieces) if pieces else None
        if mine:
            self._storage.push(mine)
        files = [name for name in self._everyones(mine.name if mine else None) if name]
        if self._rank == 0:
            directory = checkpoint_directory(root, self._done)
            if self._storage.url is None and not all((directory / name).exists() for name in files):
                raise RunError(
                    f"{directory}: what the learner's workers on other machines wrote is not there; they need a run "
                    "directory that all machines see, or `storage_path`"
                )
            meta = {
                "optimizer": self._settings.optimizer,
                "updates": self._updates,
                "skipped": self._skipped,
                "previous_probe": self._previous_probe,
                "metrics": self._metrics,
            }
            write_manifest(root, self._done, files, meta)
            seal(self._storage, root, self._done)
        if self._world > 1:
            dist.barrier()
        remove_old(root, self._done)

    def _restore(self) -> None:
        pull_checkpoint(self._storage, self._spec.checkpoints, self._done)
        with Checkpoint.opened(self._spec.checkpoints, self._done) as saved:
            if (optimizer := saved.meta["optimizer"]) != self._settings.optimizer:
                raise ConfigError(
                    f"{self._spec.checkpoints}: step {self._done} was saved with `optimizer: {optimizer}`, the config "
                    f"says {self._settings.optimizer}; write the former, or start another run"
                )
            self._strategy.load(saved)
            torch.set_rng_state(saved.whole("rng.torch"))
            if self._spec.device == "cuda":
                torch.cuda.set_rng_state(saved.whole("rng.cuda"))
        self._updates, self._skipped = int(saved.meta["updates"]), int(saved.meta["skipped"])
        self._metrics = saved.meta["metrics"]
        self._previous_probe = saved.meta["previous_probe"]
        self._probe = self._measure()

    def _publish(self) -> None:
        """Write the version to the run directory and hand it to the store; one that is there already stays as it is."""
        served, made = self._spec.publishes != "final", self._done in self._made
        written = served or self._done == self._spec.total
        weights = self._strategy.weights(trainable=self._through_adapter) if written and not made else iter(())
        if self._rank != 0:
            for _ in weights:  # they are gathered from all workers, one at a time
                pass
            return
        publication = Publication(
            ref=PolicyRef(policy=self._spec.section.name, version=self._done),
            files={},
            probe_logps=self._probe,
            previous_probe_logps=self._previous_probe,
            base_probe_logps=self._base_probe,
            metrics=self._metrics,
        )
        if written:
            self._write(publication, None if made else weights)
            if served:
                publication = replace(read_publication(self._spec.run_dir, publication.ref), metrics=self._metrics)
            if self._shelf and not made:
                shared = self._shelf.lay(self._strategy.weights(trainable=False))
                publication = replace(publication, shared=shared)
        self._feed.publish(publication)

    def _write(self, publication: Publication, weights: Iterator[tuple[str, torch.Tensor]] | None) -> None:
        if weights is None:
            return settle_version(self._storage, self._spec.run_dir, publication.ref)
        directory = version_directory(self._spec.run_dir, publication.ref)
        self._policy.save(directory, publication, weights, adapter=self._spec.publishes == "adapter")
        self._storage.push_directory(directory, PROOF)
        self._forget_versions()

    def _forget_versions(self) -> None:
        """Where only learners of the run work, its own process prunes the storage alone: the copies here are no use."""
        keep = self._spec.section.keep_versions
        if keep and self._storage.url and not (self._spec.run_dir / "config.yaml").exists():
            for old in versions(self._spec.run_dir, self._spec.section.name)[:-keep]:
                ref = PolicyRef(policy=self._spec.section.name, version=old)
                shutil.rmtree(version_directory(self._spec.run_dir, ref), ignore_errors=True)
