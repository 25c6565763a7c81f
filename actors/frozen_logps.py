"""Log-probs of π0 by whatever model holds it: reference sums, and DLMA's contrastive ones (METHODS.md §0, §1).

`actors.reference` has a model of its own, `actors.learning.frozen` a learner's without its adapter. What was computed
once is found in the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actors.metrics import REFERENCE_HITS, REFERENCE_ITEMS, REFERENCE_SECONDS
from plumbline.models.logp_cache import LogpCache
from plumbline.records import Completion, Generation, TokenGroup

CACHE_FILE = "logps.sqlite"


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


class FrozenLogps:
    """A frozen causal language model behind its cache.

    Args:
        model: computes what π0 does, in evaluation mode, whenever a method is called.
        batch_tokens: tokens of one forward.
        fingerprint: `model_fingerprint` of the directory that the weights are from.
        cache: directory of the cache; without one, it is in memory.

    Raises:
        RunError: the cache is damaged or cannot be written. Every method may raise it.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch_tokens: int,
        fingerprint: str,
        dtype: Literal["float32", "bfloat16"],
        cache: str | None,
    ) -> None:
        self._model, self._batch_tokens = model, batch_tokens
        # Values of bfloat16 are not those of float32; a cache may outlive a change of the setting.
        self._cache = LogpCache(Path(cache) / CACHE_FILE if cache is not None else None, f"{fingerprint} {dtype}")

    def counts(self) -> dict[str, int]:
        """`hits` and `misses` of the cache, in responses, since the start."""
        return {"hits": self._cache.hits, "misses": self._cache.misses}

    def logps(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """Sums over response tokens in nats, one a response; 0 for an empty one. Only what the cache lacks is computed.

        Raises:
            DataError: a prompt is empty.
        """
        from plumbline.models.group_logps import pieces

        known = self._cache.get(groups)
        missing = [
            TokenGroup(
                group.prompt_ids,
                [response for response, value in zip(group.response_ids, row, strict=True) if value is None],
            )
            for group, row in zip(groups, known, strict=True)
        ]
        rest = [p for group in missing if group.response_ids for p in pieces(group, self._batch_tokens)]
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
            eos: whether the end of an answer counts in the four, as it does in the reference log-probs.

        Raises:
            ValueError: generations are not two a prompt, or hold more or less than one completion.
        """
        if len(generations) != 2 * len(prompts):
            raise ValueError(f"{len(generations)} generations for {len(prompts)} prompts; there must be two each")
        answers = [_only(generation) for generation in generations]
        groups: list[TokenGroup] = []
        for prompt, chosen, rejected in zip(prompts, answers[::2], answers[1::2], strict=True):
            judged = [answer.ids if eos else without_end(answer) for answer in (chosen, rejected)]
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
        for indices in pack(groups, self._batch_tokens):
            batch = [groups[i] for i in indices]
            # Not in inference mode: what the model keeps of a forward, a learner's next backward could not use.
            with torch.no_grad():
                logps_GK = group_logps(self._model, batch)[0].tolist()
            for i, group, row in zip(indices, batch, logps_GK, strict=True):
                values[i] = row[: len(group.response_ids)]
            self._cache.put(batch, [values[i] for i in indices])
        return values


def without_end(completion: Completion) -> list[int]:
    """An answer's tokens without the one that ends it, which only one that stopped has (`plumbline.data.ending`)."""
    return completion.ids[:-1] if completion.finish_reason == "stop" else completion.ids


def _only(generation: Generation) -> Completion:
    if len(generation.completions) != 1:
        raise ValueError(f"{generation.key}: {len(generation.completions)} completions; a pair's answer is one")
    return generation.completions[0]
