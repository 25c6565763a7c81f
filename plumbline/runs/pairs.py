"""What a part of preference pairs holds: one row a pair, ready for pandas and for other trainers (TRL reads it).

DLMA and Self-Contrast write them, the learner turns a prompt's rows into one sample with all its negatives. A prompt's
rows follow one another and share its chosen answer.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pyarrow as pa

from plumbline.records import FinishReason, Prompt, Sample, TokenGroup
from plumbline.runs.rollouts import part_columns, prompt_text

_IDS = pa.list_(pa.int32())
_JUDGED = ("margin", "chosen_pos", "chosen_neg", "rejected_pos", "rejected_neg")

PAIR_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),  # the conversation as JSON where it has several turns, else the query
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("ref_chosen_logps", pa.float64()),  # π0's, sums over tokens with EOS, under the plain prompt
        ("ref_rejected_logps", pa.float64()),
        ("margin", pa.float64()),  # DLMA's R; the four log-probs that it is made of follow
        ("chosen_pos", pa.float64()),
        ("chosen_neg", pa.float64()),
        ("rejected_pos", pa.float64()),
        ("rejected_neg", pa.float64()),
        ("similarity", pa.float64()),  # Self-Contrast's, of the rejected answer and the target
        ("chosen_reward", pa.float64()),  # where the run has a reward; the method itself never reads it
        ("rejected_reward", pa.float64()),
        ("chosen_finish_reason", pa.string()),  # none for a target that nobody sampled
        ("rejected_finish_reason", pa.string()),
        ("engine", pa.string()),
        ("model", pa.string()),  # π0's fingerprint: log-probs of another model must not be learnt from
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One side of a pair; `finish_reason` where it was sampled, `similarity` to the target where that was measured."""

    text: str
    ids: list[int]
    finish_reason: FinishReason | None = None
    similarity: float | None = None


def pair_rows(
    *,
    step: int,
    prompt: Prompt,
    prompt_ids: Sequence[int],
    answers: Sequence[Answer],
    ref_logps: Sequence[float],
    rewards: Sequence[float] | None,
    engine: str | None,
    model: str,
    judged: Mapping[str, float] | None = None,
    parts: Sequence[Mapping[str, float]] = (),
) -> list[dict[str, object]]:
    """Rows of `PAIR_SCHEMA`, one a rejected answer.

    Args:
        answers: [K], the chosen one first.
        ref_logps, rewards: [K], of the answers; a reward that is not finite becomes null.
        judged: DLMA's margin and its four log-probs.
        parts: [K], what each part of a reward gave, where it is a sum.
    """
    scores = [r if math.isfinite(r) else None for r in rewards] if rewards else [None] * len(answers)
    chosen = answers[0]
    return [
        {
            "step": step,
            "prompt_id": prompt.id,
            "prompt": prompt_text(prompt),
            "chosen": chosen.text,
            "rejected": one.text,
            "ref_chosen_logps": ref_logps[0],
            "ref_rejected_logps": ref_logps[i],
            "similarity": one.similarity,
            "chosen_reward": scores[0],
            "rejected_reward": scores[i],
            "chosen_finish_reason": chosen.finish_reason,
            "rejected_finish_reason": one.finish_reason,
            "engine": engine,
            "model": model,
            "prompt_ids": list(prompt_ids),
            "chosen_ids": chosen.ids,
            "rejected_ids": one.ids,
            **dict.fromkeys(_JUDGED),
            **(judged or {}),
            **(part_columns(chosen_reward=parts[0], rejected_reward=parts[i]) if parts else {}),
        }
        for i, one in enumerate(answers[1:], start=1)
    ]


def pair_samples(rows: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """The training examples in a part: a prompt's chosen answer and all its negatives in one group (METHODS.md §2)."""
    return [_sample(list(one)) for _, one in groupby(rows, key=_prompt_key)]


def _prompt_key(row: Mapping[str, Any]) -> tuple[str, str]:
    """What a prompt's rows share: the same prompt, drawn again in a later pass, has another chosen answer or part."""
    return row["prompt_id"], row["chosen"]


def _sample(rows: Sequence[Mapping[str, Any]]) -> Sample:
    first = rows[0]
    responses = [list(first["chosen_ids"]), *(list(row["rejected_ids"]) for row in rows)]
    return Sample(
        group=TokenGroup(list(first["prompt_ids"]), responses),
        ref_logps=(first["ref_chosen_logps"], *(row["ref_rejected_logps"] for row in rows)),
        margins=tuple(row["margin"] for row in rows) if first["margin"] is not None else (),
        step=first["step"],
    )


def values(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """A column's values where it has any."""
    return [row[key] for row in rows if row[key] is not None]


def prompts_of(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The first row of each prompt."""
    return (next(one) for _, one in groupby(rows, key=_prompt_key))
