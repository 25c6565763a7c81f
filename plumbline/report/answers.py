"""Answers of every evaluated version to the same held-out prompts, side by side.

Called by `plumbline.report.page`. Texts are as models wrote them: the page has to escape them.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plumbline.report.tables import number, value
from plumbline.runs.parts import Row

Kept = Mapping[str, Sequence[Row]]
"""Rows of `plumbline.runs.evaluated.SCHEMA` by whose they are: ``ple@12``, ``base``, a model's directory."""

MOST = 24
"""Versions of a policy on the page; of more, some between the first and the last are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a version answered, None where it was not asked; `reward` is a number as text, or empty."""

    version: str
    text: str | None
    reward: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """`policies` are (name, what each of its versions is called, ascending), `left_out` how many of these there is no
    room for; `prompts` are (prompt, for each policy an answer for each version)."""

    policies: list[tuple[str, list[str]]]
    prompts: list[tuple[str, list[list[Answer]]]]
    left_out: int


def answers_in(evaluation: Mapping[str, Any] | None) -> Kept:
    """Those that `evaluation.json` has itself: of its first prompts, of one version a policy."""
    samples = evaluation["samples"] if evaluation else []
    rewards = (evaluation or {}).get("rewards", {})
    return {
        who: [
            {"key": str(i), "prompt": sample["prompt"], "answer": sample.get(who), "reward": reward}
            for i, (sample, reward) in enumerate(zip(samples, rewards.get(who) or [None] * len(samples), strict=False))
        ]
        for who in dict.fromkeys(name for sample in samples for name in sample if name != "prompt")
    }


def by_policy(kept: Kept, pipelines: Sequence[str]) -> dict[str, list[str]]:
    """Whose answers there are, by policy and there by version: what is no pipeline's first, then in their order."""
    found: dict[str, list[str]] = {}
    for who in sorted(kept, key=lambda who: _version(who)[1]):
        found.setdefault(_version(who)[0], []).append(who)
    order = {name: i for i, name in enumerate(pipelines)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], -1)))


def side_by_side(kept: Kept, pipelines: Sequence[str], first: Sequence[str], most: int) -> SideBySide | None:
    """Answers to `most` prompts, those of the keys `first` before others; None where there are none."""
    policies = {name: _spread(versions) for name, versions in by_policy(kept, pipelines).items()}
    asked = {who: {row["key"]: row for row in kept[who]} for versions in policies.values() for who in versions}
    prompts = {key: row["prompt"] for rows in asked.values() for key, row in rows.items()}
    keys = [key for key in dict.fromkeys([*first, *prompts]) if key in prompts][:most]
    if not keys:
        return None
    return SideBySide(
        policies=[(name, [_called(who, kept[who]) for who in versions]) for name, versions in policies.items()],
        prompts=[
            (
                str(prompts[key]),
                [[_answer(who, asked[who].get(key)) for who in versions] for versions in policies.values()],
            )
            for key in keys
        ],
        left_out=len(kept) - len(asked),
    )


def _version(who: str) -> tuple[str, int]:
    """A policy and its version; 0 where no version is named."""
    policy, _, version = who.rpartition("@")
    return (policy, int(version)) if policy and version.isdecimal() else (who, 0)


def _spread(versions: list[str]) -> list[str]:
    if len(versions) <= MOST:
        return versions
    return [versions[round(i * (len(versions) - 1) / (MOST - 1))] for i in range(MOST)]


def _called(who: str, rows: Sequence[Row]) -> str:
    rewards = [one for row in rows if not math.isnan(one := value(row["reward"]))]
    return f"{who}, mean reward {number(statistics.fmean(rewards), 3)} of {len(rewards)} answers" if rewards else who


def _answer(who: str, row: Row | None) -> Answer:
    if row is None:
        return Answer(version=who, text=None, reward="")
    reward = value(row["reward"])
    text = "" if row["answer"] is None else str(row["answer"])
    return Answer(version=who, text=text, reward="" if math.isnan(reward) else number(reward, 3))
