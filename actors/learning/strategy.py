"""How a learner's worker turns micro-batches into an update: the seam between plain torch and DeepSpeed.

A worker cuts every update into the same number of micro-batches on all workers, hands them to a `Strategy`, and asks
it for its pieces when it saves. Both strategies give the same updates, and checkpoints of the same tensors, so that a
learner resumes with another number of workers, or with the other strategy.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.learning.policy import LearnedPolicy
from plumbline.config.learner import Learner
from plumbline.models.group_logps import pack, split_by_rank
from plumbline.records import Sample
from plumbline.runs.checkpoint import Checkpoint, Piece, whole

T = TypeVar("T")
Loss = Callable[[Any, Sequence[Sample]], tuple[Tensor, dict[str, Tensor]]]
"""``(model, samples) -> (mean loss, metrics)``, as `actors.learning.objectives.Objective.loss`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Samples of one forward and backward, and the share of the update's mean that their mean loss has. A share of 0
    fills up a worker that has fewer micro-batches than another."""

    samples: list[Sample]
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What an update did: the gradient's norm before it was clipped, and the result of every micro-batch."""

    grad_norm: float
    results: list[tuple[Tensor, dict[str, Tensor]]]


class Strategy(Protocol):
    """All calls are collective: every worker makes them, in the same order."""

    def update(self, loss: Loss, micro_batches: Sequence[MicroBatch], lr: float) -> Update:
        """One optimiser step on the sum of ``share * loss`` over all workers. No step where the norm is not finite."""
        ...

    def forward(self, work: Callable[[Any], T]) -> T:
        """``work(model)`` without gradients; its forward passes must not depend on the worker."""
        ...

    def weights(self, *, trainable: bool) -> Iterator[tuple[str, Tensor]]:
        """Parameters by name, whole, as the model computes with them: all of them, or those that are trained. One at a
        time: every worker takes them all, whatever it does with them."""
        ...

    def held(self) -> Mapping[str, Tensor]:
        """The trained weights by name, as the model computes with them: whole, or this worker's pieces of them."""
        ...

    def state(self) -> dict[str, Piece]:
        """This worker's part of a checkpoint: of ``model.NAME`` and ``optimizer.INDEX.KEY``, in the optimiser's
        precision, what no other worker gives."""
        ...

    def load(self, saved: Checkpoint) -> None:
        """Go on from the `state` of all workers, also of another number of them, or of another strategy."""
        ...


class Masters:
    """What the optimiser sees of trained weights: themselves in float32, else copies in float32, with the sums of their
    gradients. In bfloat16 most updates of an ordinary learning rate round to nothing.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in parameters]
        self._pairs = [(p, copy) for p, copy in zip(parameters, self.parameters, strict=True) if p is not copy]
        for p, copy in self._pairs:
            p.register_post_accumulate_grad_hook(partial(_move_gradient, copy))

    def write_back(self) -> None:
        """The copies, rounded, into the weights that the model computes with."""
        with torch.no_grad():
            for p, copy in self._pairs:
                p.copy_(copy)


def _move_gradient(copy: nn.Parameter, parameter: Tensor) -> None:
    """A micro-batch's gradient joins the float32 sum as soon as it is there, and leaves no second one behind."""
    assert parameter.grad is not None
    if copy.grad is None:
        copy.grad = parameter.grad.float()
    else:
        copy.grad.add_(parameter.grad)
    parameter.grad = None


class TorchStrategy:
    """Every worker holds the whole model; gradients are summed over workers, in float32 whatever the model's dtype."""

    def __init__(self, policy: LearnedPolicy, settings: Learner, device: Literal["cpu", "cuda"], world: int) -> None:
        self._model = policy.model.to(device)
        self._named = dict(policy.named_trainable())
        self._masters = Masters(list(self._named.values()))
        self._optimizer = make_optimizer(settings, self._masters.parameters)
        self._clip_norm, self._world = settings.clip_norm, world

    def update(self, loss: Loss, micro_batches: Sequence[MicroBatch], lr: float) -> Update:
        self._optimizer.zero_grad(set_to_none=False)
        results = []
        for micro in micro_batches:
            value, metrics = loss(self._model, micro.samples)
            (value * micro.share).backward()
            results.append((value.detach(), metrics))
        if self._world > 1:
            sum_gradients(self._masters.parameters)
        norm = torch.as_tensor(nn.utils.clip_grad_norm_(self._masters.parameters, self._clip_norm))
        if norm.isfinite():
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._masters.write_back()
        return Update(grad_norm=float(norm), results=results)

    def forward(self, work: Callable[[Any], T]) -> T:
        with torch.no_grad():
            return work(self._model)

    def weights(self, *, trainable: bool) -> Iterator[tuple[str, Tensor]]:
        return iter(self._named.items()) if trainable else self._model.named_parameters()

    def held(self) -> Mapping[str, Tensor]:
        return self._named

    def state(self) -> dict[str, Piece]:
        if self._world > 1 and dist.get_rank() > 0:
            return {}
        masters = zip(self._named, self._masters.parameters, strict=True)
        pieces = {f"model.{name}": whole(p) for name, p in masters}
        for i, state in self._optimizer.state_dict()["state"].items():
            pieces |= {f"optimizer.{i}.{key}": whole(value) for key, value in state.items()}
        return pieces

    def load(self, saved: Checkpoint) -> None:
        with torch.no_grad():
            for name, parameter in zip(self._named, self._masters.parameters, strict=True):
                parameter.copy_(saved.whole(f"model.{name}"))
        self._masters.write_back()
        groups = self._optimizer.state_dict()["param_groups"]
        state = {
            i: {key: saved.whole(f"optimizer.{i}.{key}") for key in keys}
            for i, keys in optimizer_keys(saved.shapes()).items()
        }
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def micro_batches(batch: Sequence[Sample], world: int, rank: int, token_budget: int) -> list[MicroBatch]:
    """This worker's part of an update, in micro-batches of at most `token_budget` tokens; as many on every worker.

    Found without talking to the others. Filled up with the update's smallest sample at share 0.
    """
    groups = [sample.group for sample in batch]
    shards = [
        [[shard[i] for i in micro] for micro in pack([groups[i] for i in shard], token_budget)]
        for shard in split_by_rank(groups, world)
    ]
    mine = [MicroBatch(samples=[batch[i] for i in micro], share=len(micro) / len(batch)) for micro in shards[rank]]
    smallest = min(batch, key=lambda sample: sample.group.tokens)
    return mine + [MicroBatch(samples=[smallest], share=0.0)] * (max(map(len, shards)) - len(mine))


def make_optimizer(settings: Learner, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that the config names."""
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def optimizer_keys(names: Iterable[str]) -> dict[int, list[str]]:
    """The keys of ``optimizer.INDEX.KEY`` in a checkpoint, by index: a trainable parameter's position."""
    keys: dict[int, list[str]] = {}
    for name in names:
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            keys.setdefault(int(index), []).append(key)
    return keys


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all workers, in one call."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
