"""The frozen model: reference log-probs of every response, and DLMA's contrastive ones (METHODS.md §0, §1).

Pipelines pass a generator's answers on unread; the reference reads them where they are. What it computed once it finds
in its cache.
"""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from actors.metrics import REFERENCE_HITS, REFERENCE_ITEMS, REFERENCE_SECONDS
from plumbline.models.logp_cache import LogpCache, model_fingerprint
from plumbline.records import Completion, Generation, TokenGroup

CACHE_FILE = "logps.sqlite"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSpec:
    """All that a reference needs to start; picklable. `cache` is a directory; without one it remembers by itself."""

    model_path: str
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    threads: int
    batch_tokens: int
    cache: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastPrompts:
    """A query as token ids: plain, and under the positive and the negative scoring prompt."""

    plain_ids: list[int]
    positive_ids: list[int]
    negative_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastLogps:
    """What DLMA needs of a pair, in nats, sums over response tokens (METHODS.md §1).

    `reference` is (S(x, a1), S(x, a2)) under the plain query; the four are those of the self-reward margin R.
    """

    reference: tuple[float, float]
    chosen_pos: float
    chosen_neg: float
    rejected_pos: float
    rejected_neg: float


class Reference:
    """One frozen causal language model, loaded when it is first asked: it may be started before its model is made.

    Methods raise ModelError where the directory holds none.
    """

    def __init__(self, spec: ReferenceSpec) -> None:
        from plumbline.models.backend import set_up_torch

        set_up_torch(spec.threads)
        self._spec = spec

    @cached_property
    def _fingerprint(self) -> str:
        return model_fingerprint(self._spec.model_path)

    @cached_property
    def _eos(self) -> Any:
        from plumbline.data.prompting import read_tokenizer

        return read_tokenizer(self._spec.model_path).eos_token_id

    @cached_property
    def _cache(self) -> LogpCache:
        # Values of bfloat16 are not those of float32; a cache may outlive a change of the setting.
        place = Path(self._spec.cache) / CACHE_FILE if self._spec.cache is not None else None
        return LogpCache(place, f"{self._fingerprint} {self._spec.dtype}")

    @cached_property
    def _model(self) -> Any:
        from actors.learning.policy import load_model
        from plumbline.config.data import Model
        from plumbline.models.group_logps import disable_dropout

        assert self._fingerprint  # of the files that are loaded now
        model: Any = load_model(Model(path=self._spec.model_path), self._spec.dtype)
        model.to(self._spec.device).eval().requires_grad_(False)
        disable_dropout(model)
        return model

    def warm(self) -> None:
        """Import what loading needs."""
        importlib.import_module("actors.learning.policy")
        importlib.import_module("transformers.models.auto.modeling_auto")

    def ready(self) -> int:
        """The process id, once the model is loaded."""
        assert self._model is not None and self._cache is not None
        return os.getpid()

    def fingerprint(self) -> str:
        """`model_fingerprint` of the model's directory, as it was when the model was loaded."""
        return self._fingerprint

    def counts(self) -> dict[str, int]:
        """`hits` and `misses` of the cache, in responses, since the start."""
        return {"hits": self._cache.hits, "misses": self._cache.misses}

    def logps(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """Sums over response tokens in nats, one a response; 0 for an empty one. Only what the cache lacks is computed.

        Raises:
            DataError: a prompt is empty.
            RunError: the cache is damaged or cannot be written.
        """
        known = self._cache.get(groups)
        missing = [
            TokenGroup(
                group.prompt_ids,
                [response for response, value in zip(group.response_ids, row, strict=True) if value is None],
            )
            for group, row in zip(groups, known, strict=True)
        ]
        rest = [group for group in missing if group.response_ids]
        with REFERENCE_SECONDS.timing():
            values = [value for row in self._compute(rest) for value in row]
        REFERENCE_ITEMS.inc(len(values))
        REFERENCE_HITS.inc(sum(len(row) for row in known) - len(values))
        computed = iter(values)
        return [[next(computed) if value is None else value for value in row] for row in known]

    def contrast_logps(
        self, prompts: Sequence[ContrastPrompts], generations: Sequence[Generation], *, eos: bool
    ) -> list[ContrastLogps]:
        """Reference and contrastive log-probs of every pair.

        Args:
            prompts: one a pair.
            generations: two a pair in order, one completion each: the positive prompt's answer a1 (chosen), then the
                negative prompt's a2 (rejected).
            eos: whether a final EOS counts in the four, as it does in the reference log-probs.

        Raises:
            ValueError: generations are not two a prompt, or hold more or less than one completion.
        """
        if len(generations) != 2 * len(prompts):
            raise ValueError(f"{len(generations)} generations for {len(prompts)} prompts; there must be two each")
        answers = [_only(generation) for generation in generations]
        groups: list[TokenGroup] = []
        for prompt, chosen, rejected in zip(prompts, answers[::2], answers[1::2], strict=True):
            judged = [answer.ids if eos else self._without_eos(answer) for answer in (chosen, rejected)]
            groups += [
                TokenGroup(prompt.plain_ids, [chosen.ids, rejected.ids]),
                TokenGroup(prompt.positive_ids, judged),
                TokenGroup(prompt.negative_ids, judged),
            ]
        rows = iter(self.logps(groups))
        return [
            ContrastLogps(
                reference=(plain[0], plain[1]),
                chosen_pos=positive[0],
                chosen_neg=negative[0],
                rejected_pos=positive[1],
                rejected_neg=negative[1],
            )
            for plain, positive, negative in zip(rows, rows, rows, strict=True)
        ]

    def _compute(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """Log-probs by the model, kept in the cache one micro-batch after another."""
        import torch

        from plumbline.models.group_logps import group_logps, pack

        values: list[list[float]] = [[] for _ in groups]
        for indices in pack(groups, self._spec.batch_tokens):
            batch = [groups[i] for i in indices]
            with torch.inference_mode():
                logps_GK = group_logps(self._model, batch)[0].tolist()
            for i, group, row in zip(indices, batch, logps_GK, strict=True):
                values[i] = row[: len(group.response_ids)]
            self._cache.put(batch, [values[i] for i in indices])
        return values

    def _without_eos(self, completion: Completion) -> list[int]:
        ended = completion.finish_reason == "stop" and completion.ids[-1:] == [self._eos]
        return completion.ids[:-1] if ended else completion.ids


def _only(generation: Generation) -> Completion:
    if len(generation.completions) != 1:
        raise ValueError(f"{generation.key}: {len(generation.completions)} completions; a pair's answer is one")
    return generation.completions[0]
