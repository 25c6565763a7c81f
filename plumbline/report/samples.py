"""How rewards and margins of answers are spread, each bar with samples of the answers in it.

Called by `plumbline.report.page`. Texts are as models wrote them: the page has to escape them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbline.report.answers import Kept, by_policy
from plumbline.report.plots import NEUTRAL
from plumbline.report.tables import number, value
from plumbline.runs.parts import Parts, Row

BARS = 20
EACH = 8
"""Samples behind a bar."""
LONGEST = 600
"""Characters of a text."""
ENOUGH = 2048
"""Rows of the newest steps that are counted."""

SPREADS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "plain_reward": ("reward of plain answers", ("prompt", "plain", "guided", "guided_reward")),
    "reward": ("reward of the best answer", ("prompt", "answer")),
    "margin": ("self-reward margin R, nats", ("prompt", "chosen", "rejected", "rejected_reward")),
    "similarity": ("similarity of the negative to the target", ("prompt", "chosen", "rejected", "rejected_reward")),
    "rejected_reward": ("reward of rejected answers", ("prompt", "chosen", "rejected")),
}
"""What is counted of a pipeline's rows, the first of these that they have, and what else is shown of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """`count` of values from `low` to `high`; `height` in percent of the highest bar."""

    low: str
    high: str
    count: int
    height: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """`rows` are (number of their bar, a text for each column); all of them where there are few."""

    title: str
    unit: str
    color: str
    total: int
    bars: list[Bar]
    columns: list[str]
    rows: list[tuple[int, list[str]]]


def heldout_spreads(kept: Kept, pipelines: Sequence[str], colored: Mapping[str, str]) -> list[Histogram]:
    """Of held-out rewards, the newest version's of each policy."""
    newest = {policy: versions[-1] for policy, versions in by_policy(kept, pipelines).items()}
    found = (
        _histogram(
            f"Held out: {who}", "reward", colored.get(policy, NEUTRAL), kept[who], "reward", ("prompt", "answer")
        )
        for policy, who in newest.items()
    )
    return [one for one in found if one is not None]


def training_spreads(run_dir: Path, colored: Mapping[str, str]) -> list[Histogram]:
    """Of the newest rows that each pipeline was trained on. Raises DataError where a part is damaged."""
    found = []
    for name, color in colored.items():
        for kind in ("rollouts", "pairs"):
            parts = Parts(str(run_dir / kind / name), read_only=True)
            rows: list[Row] = []
            steps = parts.steps()
            while steps and len(rows) < ENOUGH:
                table = parts.read_table(steps.pop())
                there = [c for c in table.column_names if not c.endswith("_ids")]
                rows = [*table.select(there).to_pylist(), *rows]
            for figure, (unit, texts) in SPREADS.items():
                last = f"Training: {name}, steps {rows[0]['step']} to {rows[-1]['step']}" if rows else ""
                one = _histogram(last, unit, color, rows, figure, ("step", *texts))
                if one is not None:
                    found.append(one)
                    break
    return found


def _histogram(
    title: str, unit: str, color: str, rows: Sequence[Row], figure: str, columns: Sequence[str]
) -> Histogram | None:
    """Of a figure of rows that have it; None where none has it."""
    there = [(x, row) for row in rows if not math.isnan(x := value(row.get(figure)))]
    if not there:
        return None
    values = np.array([x for x, _ in there])
    counts, edges = np.histogram(values, bins=min(BARS, len(np.unique(values))))
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(counts) - 1)
    digits = max(0, min(6, 2 - math.floor(math.log10(np.ptp(edges)))))
    shown = []
    for bar in range(len(counts)):
        inside = np.flatnonzero(places == bar)
        for i in inside[:: max(1, math.ceil(len(inside) / EACH))]:
            shown.append((bar, [*(_text(there[i][1].get(column)) for column in columns), number(there[i][0], digits)]))
    return Histogram(
        title=title,
        unit=unit,
        color=color,
        total=len(there),
        bars=[
            Bar(
                low=number(low, digits),
                high=number(high, digits),
                count=int(count),
                height=100 * count / counts.max(),
            )
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ],
        columns=[column.replace("_", " ") for column in (*columns, figure)],
        rows=shown,
    )


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return number(cell, 3) if math.isfinite(cell) else ""
    text = "" if cell is None else str(cell)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
