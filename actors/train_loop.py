"""What one worker of a learner does: take a part, update, save, publish, acknowledge; until the channel closes.

Every worker holds the whole model and sees every part; each takes its share of an update's groups, gradients are summed
over workers, so that the result does not depend on how many there are. Rank 0 leases, saves and publishes.
"""

import math
import random
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from actors.channel import Box, Lease
from actors.objectives import build_objective
from actors.policy import LearnedPolicy
from plumbline.checkpoint import latest_step, load_checkpoint, save_checkpoint
from plumbline.config import Learner, Model, Pipeline
from plumbline.errors import LossError, PlumblineError, RunError
from plumbline.modeling import pack, split_by_rank
from plumbline.policies import read_publication, version_directory
from plumbline.records import PolicyRef, Publication, Sample, TokenGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """All that a learner needs; picklable. `total` counts parts, checkpoints and versions go into `run_dir`.

    `publishes`: every version as an adapter that generators take, or one whole model at the end.
    """

    section: Pipeline
    model: Model
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    probe: tuple[TokenGroup, ...]
    total: int
    seed: int
    run_dir: Path
    publishes: Literal["adapter", "final"]

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints" / self.section.name


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
        feed.fail(spec.section.name, RunError(f"the learner of {spec.section.name} failed: {error!r}"))
        raise


class Worker:
    """The state of one worker: model, optimiser, counters."""

    def __init__(self, spec: LearnerSpec, feed: Feed, rank: int, world: int) -> None:
        torch.set_num_threads(spec.section.learner.cpus)
        torch.manual_seed(spec.seed)
        random.seed(spec.seed)
        self._spec, self._feed, self._rank, self._world = spec, feed, rank, world
        self._settings: Learner = spec.section.learner
        self._objective = build_objective(spec.section, spec.run_dir / "rollouts" / spec.section.name, spec.seed)
        self._policy = LearnedPolicy(spec.section, spec.model, spec.dtype, spec.device, spec.seed)
        self._optimizer = make_optimizer(self._settings, self._policy.trainable)
        self._updates = 0
        self._done = latest_step(spec.checkpoints)
        self._base_probe = self._policy.probe(spec.probe)
        self._probe = self._previous_probe = self._base_probe
        self._metrics: dict[str, float] = {}
        if self._done:
            self._restore()
        self._objective.restore(self._done)

    def run(self) -> None:
        """Take parts until there are no more."""
        holder = uuid.uuid4().hex
        if self._rank == 0:
            if self._done:  # died between saving and publishing, or the whole run was resumed
                self._publish()
            self._feed.attach(holder, self._done)
        every = self._settings.checkpoint_every or (1 if self._spec.publishes == "adapter" else 50)
        waited = time.monotonic()
        for step, samples in self._parts(holder):
            started = time.monotonic()
            self._metrics = self._train_on(step, samples)
            self._previous_probe, self._probe = self._probe, self._policy.probe(self._spec.probe)
            self._done = step
            if self._rank == 0:
                self._metrics |= {"learner_wait_s": started - waited, "learner_work_s": time.monotonic() - started}
                saved = step % every == 0 or step == self._spec.total
                if saved:
                    self._save()
                self._publish()
                if saved:
                    self._feed.ack(step, holder)
            waited = time.monotonic()

    def _parts(self, holder: str) -> Iterator[tuple[int, list[Sample]]]:
        """Parts in order, the same on all workers: rank 0 leases, the others are told the step."""
        while True:
            lease = self._feed.lease(holder) if self._rank == 0 else None
            step = lease.step if lease else 0
            if self._world > 1:
                told = torch.tensor([step], device=self._policy.device)
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
        for batch in self._objective.updates(step, samples):
            norms.append(self._update(step, batch, sums))
            count += len(batch)
        metrics = {key: value / count for key, value in self._gathered(sums).items()} if count else {}
        metrics |= self._objective.figures()
        return metrics | {
            "updates": float(len(norms)),
            "grad_norm": sum(norms) / len(norms) if norms else 0.0,
            "lr": self._lr(step),
        }

    def _update(self, step: int, batch: Sequence[Sample], sums: dict[str, float]) -> float:
        """One optimiser step over `batch`, in micro-batches of at most `micro_tokens`. Returns the gradient's norm."""
        groups = [sample.group for sample in batch]
        mine = split_by_rank(groups, self._world)[self._rank]
        self._optimizer.zero_grad(set_to_none=False)
        for micro in pack([groups[i] for i in mine], self._settings.micro_tokens):
            chosen = [batch[mine[i]] for i in micro]
            loss, metrics = self._objective.loss(self._policy.model, chosen)
            if not math.isfinite(loss.item()):
                raise LossError(self._failure(step, f"the loss became {loss.item()}"))
            (loss * (len(chosen) / len(batch))).backward()
            for key, value in {"loss": loss.detach(), **metrics}.items():
                sums[key] = sums.get(key, 0.0) + float(value) * len(chosen)
        if self._world > 1:
            sum_gradients(self._policy.trainable)
        norm = float(torch.nn.utils.clip_grad_norm_(self._policy.trainable, self._settings.clip_norm))
        if not math.isfinite(norm):
            raise LossError(self._failure(step, f"the gradient became {norm}"))
        self._updates += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr(step)
        self._optimizer.step()
        return norm

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

    def _save(self) -> None:
        tensors = {f"model.{name}": p.detach() for name, p in self._policy.named_trainable()}
        for i, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
        tensors["rng.torch"] = torch.get_rng_state()
        if self._spec.device == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        meta = {"updates": self._updates, "previous_probe": self._previous_probe, "metrics": self._metrics}
        save_checkpoint(self._spec.checkpoints, self._done, tensors, meta)

    def _restore(self) -> None:
        tensors, meta = load_checkpoint(self._spec.checkpoints, self._done)
        with torch.no_grad():
            for name, parameter in self._policy.named_trainable():
                parameter.copy_(tensors[f"model.{name}"])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, _, key = rest.partition(".")
                state.setdefault(int(index), {})[key] = tensor
        self._optimizer.load_state_dict({"state": state, "param_groups": self._optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["rng.torch"])
        if self._spec.device == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        self._updates = int(meta["updates"])
        self._metrics = meta["metrics"]
        self._previous_probe = meta["previous_probe"]
        self._probe = self._policy.probe(self._spec.probe)

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
        adapter = self._spec.publishes == "adapter"
        if adapter or self._done == self._spec.total:
            directory = version_directory(self._spec.run_dir, publication.ref)
            self._policy.save(directory, publication, adapter=adapter)
            if adapter:
                publication = replace(read_publication(self._spec.run_dir, publication.ref), metrics=self._metrics)
        self._feed.publish(publication)


def make_optimizer(settings: Learner, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that the config names."""
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sum gradients over all workers, in one call."""
    for parameter in parameters:
        if parameter.grad is None:  # a worker without a group in this update
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
