"""π0 inside a learner: the model that is trained, without its adapter, answers what a pipeline asks of π0.

In the thread that trains, between two forward passes: taking the adapter away changes every layer, until it is given
back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from actors.desk import Question
from actors.frozen_logps import FrozenLogps
from actors.learning.objectives import Loss, Scores
from plumbline.records import TokenGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenSpec:
    """π0's directory, its `model_fingerprint`, and the directory of the cache of log-probs."""

    model_path: str
    fingerprint: str
    dtype: Literal["float32", "bfloat16"]
    cache: str


class FrozenBase:
    """π0 under the adapter of a learner's `model`, on its device; a forward is of at most `batch_tokens`.

    Raises:
        RunError: the cache is damaged or cannot be written. So does `answer`.
    """

    def __init__(self, spec: FrozenSpec, model: Any, batch_tokens: int) -> None:
        self._model = model
        self._logps = FrozenLogps(
            model,
            batch_tokens=batch_tokens,
            fingerprint=spec.fingerprint,
            dtype=spec.dtype,
            cache=spec.cache,
        )

    def answer(self, question: Question) -> tuple[Any, dict[str, int]]:
        """What π0 says, and by how much that moved the cache's counts."""
        before = self._logps.counts()
        with without_adapter(self._model):
            answer = getattr(self._logps, question.method)(*question.arguments, **question.options)
        return answer, {key: value - before[key] for key, value in self._logps.counts().items()}


class Between:
    """An objective that calls `pause` before each of its forward passes."""

    def __init__(self, objective: Loss, pause: Callable[[], None]) -> None:
        self._objective, self._pause = objective, pause
        self.loss = objective.loss

    def forward(self, model: Any, groups: Sequence[TokenGroup]) -> Scores:
        self._pause()
        return self._objective.forward(model, groups)


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The base of a PEFT model, in evaluation mode and without gradients; afterwards it trains as before."""
    with torch.no_grad(), model.disable_adapter():
        model.eval()
        try:
            yield
        finally:
            model.train()
