"""How fast a learner's worker trains, how much of its cards that is, and what they did meanwhile. A worker has one."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from actors.gpu import GpuWatch
from actors.metrics import (
    LEARNER_LOSS,
    LEARNER_MFU,
    LEARNER_SAMPLES,
    LEARNER_SECONDS,
    LEARNER_TOKENS,
    LEARNER_UPDATES,
)
from plumbline.models.flops import card_peak, training_cost
from plumbline.records import TokenGroup


class Pace:
    """Figures of a step.

    Args:
        model: whole, before a strategy cuts its weights.
        world: workers, each with a card of this kind.
    """

    def __init__(self, model: nn.Module, device: Literal["cpu", "cuda"], world: int) -> None:
        self._cost = training_cost(model)
        peak = card_peak(torch.cuda.get_device_name()) if device == "cuda" else None
        self._peak = peak * world if peak else None
        self._watch = GpuWatch() if device == "cuda" else None
        self._seen = None if self._watch is None else self._watch.use

    def figures(self, groups: Sequence[TokenGroup], seconds: float) -> dict[str, float]:
        """`learner_tokens_per_s` and `mfu` of all workers together, which trained on `groups` for `seconds`; no `mfu`
        on a CPU, on an unknown card, and for a model whose FLOPs are not known."""
        found = {"learner_tokens_per_s": sum(group.tokens for group in groups) / seconds}
        if self._cost is not None and self._peak is not None:
            found["mfu"] = self._cost.of(groups) / (seconds * self._peak)
        return found

    def gpu(self) -> dict[str, float]:
        """`learner_gpu_busy` and `learner_gpu_gib` of this worker's card since the last call; empty without one."""
        if self._watch is None or self._seen is None:
            return {}
        before, self._seen = self._seen, self._watch.use
        return {f"learner_{key}": value for key, value in self._seen.since(before).items()}


def count_part(pipeline: str, metrics: Mapping[str, float], groups: Sequence[TokenGroup], seconds: float) -> None:
    """A part that was trained on, for Prometheus."""
    LEARNER_UPDATES.inc(metrics["updates"], pipeline=pipeline)
    LEARNER_SAMPLES.inc(len(groups), pipeline=pipeline)
    LEARNER_TOKENS.inc(sum(group.tokens for group in groups), pipeline=pipeline)
    LEARNER_SECONDS.observe(seconds, pipeline=pipeline)
    if "loss" in metrics:
        LEARNER_LOSS.set(metrics["loss"], pipeline=pipeline)
    if "mfu" in metrics:
        LEARNER_MFU.set(metrics["mfu"], pipeline=pipeline)
