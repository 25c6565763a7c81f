"""How a learner's worker turns micro-batches into an update: the seam between plain torch and DeepSpeed.

A worker takes its `Portion` of every update, with as many forward passes as every other, hands it to a `Strategy`, and
asks it for its pieces when it saves. Both strategies give the same updates, and checkpoints of the same tensors, so
that a learner resumes with another number of workers, or with the other strategy.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.learning.objectives import Loss, Scores
from actors.learning.policy import LearnedPolicy
from plumbline.config.learner import Learner
from plumbline.models.group_logps import pack, pieces, split_by_rank
from plumbline.records import Sample, TokenGroup
from plumbline.runs.checkpoint import Checkpoint, Piece, whole

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Samples of one loss, and the share of the update's mean that their mean loss has.

    `passes`: what is computed at a time: all their groups, or the pieces of a single one that is too large.
    """

    samples: list[Sample]
    share: float
    passes: list[list[TokenGroup]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """A worker's part of an update.

    On every worker there are `drafts` forward passes without gradients and then `passes` with, whatever its own
    micro-batches need: ZeRO 3 has all workers compute together. Who has less to do computes `filler`, for nothing.
    """

    micro_batches: list[MicroBatch]
    filler: TokenGroup
    drafts: int
    passes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The loss of a micro-batch, its metrics, and the micro-batch's share of the update."""

    share: float
    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What an update did: the gradient's norm before it was clipped, and the result of every micro-batch."""

    grad_norm: float
    results: list[Result]


class Strategy(Protocol):
    """All calls are collective: every worker makes them, in the same order."""

    def update(self, objective: Loss, portion: Portion, lr: float) -> Update:
        """One optimiser step on the sum of ``share * loss`` over all workers. No step where the norm is not finite,
        on any of them: weights and the optimiser's state are then as they were."""
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

    def update(self, objective: Loss, portion: Portion, lr: float) -> Update:
        self._optimizer.zero_grad(set_to_none=False)
        results: list[Result] = []
        for work in backward_passes(objective, portion, self.forward, results):
            work(self._model).backward()
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
        held = {f"model.{name}": whole(p) for name, p in masters}
        for i, parameter in enumerate(self._masters.parameters):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                # The 8-bit optimiser counts steps in an int, and has one table of levels for all weights.
                shared = key.startswith("qmap")
                held[f"optimizer.{i}.{key}"] = whole(value.clone() if shared else torch.as_tensor(value))
        return held

    def load(self, saved: Checkpoint) -> None:
        with torch.no_grad():
            for name, parameter in zip(self._named, self._masters.parameters, strict=True):
                parameter.copy_(saved.whole(f"model.{name}"))
        self._masters.write_back()
        groups = self._optimizer.state_dict()["param_groups"]
        state = {
            i: {key: _plain(saved.whole(f"optimizer.{i}.{key}")) for key in keys}
            for i, keys in optimizer_keys(saved.shapes()).items()
        }
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def portion_of(batch: Sequence[Sample], world: int, rank: int, token_budget: int) -> Portion:
    """This worker's part of an update, in forward passes of at most `token_budget` tokens.

    Found without talking to the others.
    """
    groups = [sample.group for sample in batch]
    plans = []
    for shard in split_by_rank(groups, world):
        packed = [[shard[i] for i in micro] for micro in pack([groups[i] for i in shard], token_budget)]
        plans.append([_micro_batch([batch[i] for i in micro], len(batch), token_budget) for micro in packed])
    smallest = min(groups, key=lambda group: group.tokens)
    return Portion(
        micro_batches=plans[rank],
        filler=TokenGroup(smallest.prompt_ids, [min(filter(None, smallest.response_ids), key=len, default=[])]),
        drafts=max(sum(len(micro.passes) for micro in plan if len(micro.passes) > 1) for plan in plans),
        passes=max(sum(len(micro.passes) for micro in plan) for plan in plans),
    )


def _micro_batch(samples: list[Sample], of: int, token_budget: int) -> MicroBatch:
    groups = [sample.group for sample in samples]
    passes = [groups] if len(groups) > 1 else [[piece] for piece in pieces(groups[0], token_budget)]
    return MicroBatch(samples=samples, share=len(samples) / of, passes=passes)


def backward_passes(
    objective: Loss,
    portion: Portion,
    forward: Callable[[Callable[[Any], Any]], Any],
    results: list[Result],
) -> list[Callable[[Any], Tensor]]:
    """The forward passes of an update, ``work(model) -> scalar``, each of which is to be followed by a backward pass.

    A group in pieces is computed twice: its loss needs the scores of all of them, and memory is for the activations of
    one. So scores come first, without gradients; the loss gives each its gradient; and a piece's scalar is its
    scores times these. Gradients, summed over the pieces, are the whole group's.

    Args:
        forward: see `Strategy.forward`; called at once, `portion.drafts` times.
        results: gets every micro-batch's, at the latest in the last of the passes.
    """

    def note(micro: MicroBatch, scores: Scores) -> Tensor:
        loss, metrics = objective.loss(scores, micro.samples)
        results.append(Result(share=micro.share, loss=loss.detach(), metrics=metrics))
        # A loss that is no finite number may have a gradient that is: it must not lead to a step.
        return loss * (micro.share if loss.isfinite() else math.nan)

    def at_once(micro: MicroBatch, model: Any) -> Tensor:
        return note(micro, objective.forward(model, micro.passes[0]))

    def piece(groups: list[TokenGroup], seed: int, gradient: Tensor, model: Any) -> Tensor:
        return (_scores(objective, groups, seed, model)[0] * gradient).sum()

    works: list[Callable[[Any], Tensor]] = []
    drafts = 0
    for micro in portion.micro_batches:
        if len(micro.passes) == 1:
            works.append(partial(at_once, micro))
            continue
        seeds = torch.randint(2**31, (len(micro.passes),)).tolist()
        drawn = [
            forward(partial(_scores, objective, groups, seed)) for groups, seed in zip(micro.passes, seeds, strict=True)
        ]
        drafts += len(drawn)
        values = torch.cat([one for one, _ in drawn], dim=1).requires_grad_()
        loss = note(micro, (values, torch.cat([tokens for _, tokens in drawn], dim=1)))
        (gradient,) = torch.autograd.grad(loss, values)
        parts = gradient.split([one.shape[1] for one, _ in drawn], dim=1)
        works += [partial(piece, *args) for args in zip(micro.passes, seeds, parts, strict=True)]
    filler = [portion.filler]
    for _ in range(portion.drafts - drafts):
        forward(partial(_scores, objective, filler, 0))
    return works + [partial(piece, filler, 0, torch.zeros(()))] * (portion.passes - len(works))


def _scores(objective: Loss, groups: list[TokenGroup], seed: int, model: Any) -> Scores:
    """The same in a draft and in the pass that it is for, also where an adapter has dropout."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        return objective.forward(model, groups)


def make_optimizer(settings: Learner, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that the config names."""
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    if settings.optimizer == "adamw_8bit":
        bitsandbytes = importlib.import_module("bitsandbytes")  # by name: it may not be installed
        return bitsandbytes.optim.AdamW8bit(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
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


def _plain(value: Tensor) -> Tensor | int:
    """What an optimiser's state held: the 8-bit one counts steps in an int."""
    return int(value) if value.dtype == torch.int64 and not value.dim() else value


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all workers, in one call."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
