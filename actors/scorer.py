"""Rewards: a Hugging Face sequence classifier, a Python function, or a service behind HTTP. Larger is better.

Pipelines pass a generator's answer on unread; the scorer reads it where it is. A blank response is not scored and a
score that is not a finite number stays one: the pipeline's commit counts and rejects both (METHODS.md §4). A reward
that fails is asked once more, a service as often as its section says; what has no score then has a reason.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from actors.metrics import SCORER_ITEMS, SCORER_SECONDS
from plumbline.config.data import ServiceReward
from plumbline.data.reward_text import Reads, reward_texts
from plumbline.errors import ConfigError, RunError, in_one_line
from plumbline.models.classifier import classifier_logits, packs_texts
from plumbline.models.services import open_service
from plumbline.records import Generation, Message, ScoreRequest

RewardFunction = Callable[[Sequence[ScoreRequest]], Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerSpec:
    """All that a scorer needs to start; picklable. Exactly one of `function`, `service` and `path` is set; `cache` is
    the directory that a service's scores are kept in."""

    function: str | None = None
    service: ServiceReward | None = None
    cache: str | None = None
    path: str | None = None
    reads: Reads = "response"
    max_len: int = 512
    batch_tokens: int = 8192
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What a reward sees of a prompt, beside the answers: never the principle."""

    messages: tuple[Message, ...]
    extra: dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One list of floats a generation, one a completion, nan for a blank one and where the reward failed; `failure`
    says how it did, the first of several."""

    values: list[list[float]]
    failure: str = ""

    @property
    def failed(self) -> int:
        """Answers without a score where the reward failed."""
        return sum(math.isnan(value) for values in self.values for value in values) if self.failure else 0


class Scorer:
    """One reward. Scores are Python floats, nan for a blank response."""

    def __init__(self, spec: ScorerSpec) -> None:
        self._service = open_service(spec.service, spec.cache) if spec.service else None
        if self._service is None:
            self._reward = load_function(spec.function) if spec.function else ClassifierReward(spec)

    def ready(self) -> int:
        """The process id, once the reward is loaded."""
        return os.getpid()

    def cost(self) -> dict[str, int]:
        """What a service was asked since the start, see `plumbline.models.services.Cost`; nothing of other rewards."""
        return asdict(self._service.cost) if self._service else {}

    def score(self, requests: Sequence[ScoreRequest]) -> tuple[list[float], str]:
        """One score a request, nan for a blank response and where the reward failed; and how that did, or ""."""
        asked = [i for i, request in enumerate(requests) if request.response.strip()]
        scores = [math.nan] * len(requests)
        if not asked:
            return scores, ""
        some = [requests[i] for i in asked]
        with SCORER_SECONDS.timing():
            answered, failure = self._service.score(some) if self._service else self._call(some)
        SCORER_ITEMS.inc(len(asked))
        for i, score in zip(asked, answered, strict=True):
            scores[i] = score
        return scores, failure

    def score_generations(self, queries: Sequence[Query], generations: Sequence[Generation]) -> Scores:
        """Scores of every completion: one list a generation, whose query stands at the same place."""
        texts = [[completion.text for completion in generation.completions] for generation in generations]
        return self.score_answers(queries, texts)

    def score_answers(self, queries: Sequence[Query], answers: Sequence[Sequence[str]]) -> Scores:
        """Scores of every answer: one list a query."""
        requests = [
            ScoreRequest(messages=query.messages, response=text, extra=query.extra)
            for query, texts in zip(queries, answers, strict=True)
            for text in texts
        ]
        found, failure = self.score(requests)
        scores = iter(found)
        return Scores(values=[[next(scores) for _ in texts] for texts in answers], failure=failure)

    def _call(self, requests: Sequence[ScoreRequest]) -> tuple[list[float], str]:
        """Scores, asked for a second time where that fails; nan for all and why where it fails again."""
        failure = ""
        for _ in range(2):
            try:
                answered = self._reward(requests)
                if len(answered) != len(requests):
                    what = f"it returned {len(answered)} scores for {len(requests)} requests; it must be one each"
                    raise RunError(what)
                return [float(score) for score in answered], ""
            except Exception as error:  # the user's code can fail as any code can
                failure = in_one_line(error)
        return [math.nan] * len(requests), failure


def load_function(name: str) -> RewardFunction:
    """`module:function`, the working directory included. Raises ConfigError where there is none."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward.function: {name}: {error}; write module:function, importable from here") from None
    if not callable(function):
        raise ConfigError(f"reward.function: {name} is no function")
    return cast(RewardFunction, function)


class ClassifierReward:
    """A sequence classifier: one label is a value, of two the log-odds of the second."""

    def __init__(self, spec: ScorerSpec) -> None:
        from transformers import AutoModelForSequenceClassification

        from plumbline.data.tokenizer import read_tokenizer
        from plumbline.models.backend import set_up_torch
        from plumbline.models.loading import load_whole

        set_up_torch(spec.threads)
        assert spec.path is not None
        self._spec = spec
        self._tokenizer: Any = read_tokenizer(spec.path)
        self._model: Any = load_whole(AutoModelForSequenceClassification, spec.path, "auto")
        self._model.to(spec.device).eval()
        if self._model.config.pad_token_id is None:
            pad = self._tokenizer.pad_token_id
            self._model.config.pad_token_id = self._tokenizer.eos_token_id if pad is None else pad
        if self._model.config.num_labels > 2:
            raise ConfigError(
                f"{spec.path}: a classifier of {self._model.config.num_labels} labels; a reward has 1 or 2"
            )
        self._pads = not packs_texts(self._model)
        self.truncated = 0

    def __call__(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """One score a request, computed in batches of at most `batch_tokens` tokens, padding included."""
        import torch

        spec = self._spec
        texts = reward_texts(self._tokenizer, requests, reads=spec.reads, max_len=spec.max_len)
        self.truncated += sum(text.cut for text in texts)
        lengths = [len(text.ids) for text in texts]
        scores = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: lengths[i])
        with torch.inference_mode():
            for batch in _batches(order, lengths, spec.batch_tokens, pads=self._pads):
                logits = classifier_logits(self._model, [texts[i].ids for i in batch], [texts[i].beside for i in batch])
                values = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
                for i, value in zip(batch, values.tolist(), strict=True):
                    scores[i] = value
        return scores


def _batches(order: Sequence[int], lengths: Sequence[int], budget: int, *, pads: bool) -> list[list[int]]:
    """Consecutive runs of `order` (ascending in length) whose tokens, with padding if `pads`, are at most `budget`."""
    batches: list[list[int]] = []
    filled = 0
    for i in order:
        size = (len(batches[-1]) + 1) * lengths[i] if pads and batches else filled + lengths[i]
        if batches and size <= budget:
            batches[-1].append(i)
            filled += lengths[i]
        else:
            batches.append([i])
            filled = lengths[i]
    return batches
