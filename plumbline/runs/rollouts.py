"""What parts of sampled answers hold: PLE's two answers a prompt with their scores, RAFT's best of several.

The pipelines make rows, the learner turns them into samples, reports and people read them.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from plumbline.records import Completion, Prompt, Sample, TokenGroup

_IDS = pa.list_(pa.int32())
_PARTS = "_parts"

PLE_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),  # the conversation as JSON where it has several turns, else the query
        ("plain", pa.string()),
        ("guided", pa.string()),
        ("plain_reward", pa.float64()),
        ("guided_reward", pa.float64()),
        ("plain_finish_reason", pa.string()),
        ("guided_finish_reason", pa.string()),
        ("version", pa.int64()),
        ("staleness", pa.int64()),
        ("engine", pa.string()),
        ("prompt_ids", _IDS),
        ("plain_ids", _IDS),
        ("guided_ids", _IDS),
    ]
)


def ple_row(
    *,
    step: int,
    prompt: Prompt,
    prompt_ids: Sequence[int],
    plain: Completion,
    guided: Completion,
    rewards: tuple[float, float],
    version: int,
    staleness: int,
    engine: str,
    parts: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {}),
) -> dict[str, object]:
    """One row of `PLE_SCHEMA`; `prompt_ids` are the plain prompt's, `parts` what each part of a reward gave."""
    return {
        "step": step,
        "prompt_id": prompt.id,
        "prompt": prompt_text(prompt),
        "plain": plain.text,
        "guided": guided.text,
        "plain_reward": rewards[0],
        "guided_reward": rewards[1],
        "plain_finish_reason": plain.finish_reason,
        "guided_finish_reason": guided.finish_reason,
        "version": version,
        "staleness": staleness,
        "engine": engine,
        "prompt_ids": list(prompt_ids),
        "plain_ids": plain.ids,
        "guided_ids": guided.ids,
        **part_columns(plain_reward=parts[0], guided_reward=parts[1]),
    }


def ple_sample(row: Mapping[str, Any]) -> Sample:
    """The training example in a row: both answers under the plain prompt, with (s, s') (METHODS.md §3)."""
    return Sample(
        group=TokenGroup(list(row["prompt_ids"]), [list(row["plain_ids"]), list(row["guided_ids"])]),
        rewards=(row["plain_reward"], row["guided_reward"]),
        step=row["step"],
    )


BEST_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("reward", pa.float64()),
        ("rewards", pa.list_(pa.float64())),  # of all that were drawn, in their order
        ("finish_reason", pa.string()),
        ("engine", pa.string()),
        ("prompt_ids", _IDS),
        ("answer_ids", _IDS),
    ]
)


def best_row(
    *,
    step: int,
    prompt: Prompt,
    prompt_ids: Sequence[int],
    best: Completion,
    rewards: Sequence[float],
    engine: str,
    parts: Sequence[Mapping[str, float]] = (),
) -> dict[str, object]:
    """One row of `BEST_SCHEMA`: `best` is the answer with the highest of `rewards`. `parts`: see `ple_row`."""
    columns = part_columns(reward=parts[rewards.index(max(rewards))], rewards=parts) if any(parts) else {}
    return {
        "step": step,
        "prompt_id": prompt.id,
        "prompt": prompt_text(prompt),
        "answer": best.text,
        "reward": max(rewards),
        "rewards": list(rewards),
        "finish_reason": best.finish_reason,
        "engine": engine,
        "prompt_ids": list(prompt_ids),
        "answer_ids": best.ids,
        **columns,
    }


def best_sample(row: Mapping[str, Any]) -> Sample:
    """The training example in a row: supervised fine-tuning on the best answer."""
    return Sample(group=TokenGroup(list(row["prompt_ids"]), [list(row["answer_ids"])]), step=row["step"])


def with_parts(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    """A schema with what each part of a reward gave beside its rewards, such as `plain_reward_parts`, a struct with a
    field for each of `names`; without any, the schema itself."""
    each = pa.struct([(name, pa.float64()) for name in names])
    for field in schema if names else ():
        if field.name.endswith(("reward", "rewards")):
            several = pa.types.is_list(field.type)
            schema = schema.append(pa.field(f"{field.name}{_PARTS}", pa.list_(each) if several else each))
    return schema


def part_columns(**columns: Mapping[str, float] | Sequence[Mapping[str, float]]) -> dict[str, object]:
    """Cells of `with_parts`' columns, by those of the rewards; none of a reward that is no sum. What is not finite is
    null."""

    def cell(given: Any) -> object:
        if not isinstance(given, Mapping):
            return [cell(one) for one in given]
        return {name: value if math.isfinite(value) else None for name, value in given.items()}

    return {f"{column}{_PARTS}": cell(given) for column, given in columns.items() if given}


def part_means(rows: Iterable[Mapping[str, Any]], **figures: str) -> dict[str, float]:
    """The mean of what each part of a reward gave, as figures of an event: ``reward_plain.NAME``.

    Args:
        figures: the column of the rewards that each figure is of.
    """
    kept, found = list(rows), {}
    for figure, column in figures.items():
        cells = [row[f"{column}{_PARTS}"] for row in kept if row.get(f"{column}{_PARTS}")]
        given = [one for cell in cells for one in (cell if isinstance(cell, list) else [cell])]
        for name in given[0] if given else ():
            if values := [one[name] for one in given if one[name] is not None]:
                found[f"{figure}.{name}"] = statistics.fmean(values)
    return found


def prompt_text(prompt: Prompt) -> str:
    """The query of a single-turn prompt; the whole conversation as JSON of a longer one; nothing of a bad row."""
    if len(prompt.messages) < 2:
        return prompt.query if prompt.messages else ""
    return json.dumps([{"role": m.role, "content": m.content} for m in prompt.messages], ensure_ascii=False)
