"""The numbers of a run's report as tables of text: before against after, and what was rejected. Made with pandas.

Called by `plumbline.report.page`. Every cell is text that the page still has to escape.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from plumbline.methods.evaluation import table
from plumbline.runs.parts import Rejected

# What the columns of an evaluation mean, and which way is better: 1 up, -1 down, 0 neither.
MEANING: Mapping[str, tuple[int, str]] = {
    "reward": (1, "mean reward of plain answers"),
    "guided": (1, "the same with the principle before the prompt"),
    "gap": (-1, "guided − plain, paired by prompt; what is left to learn"),
    "PPL": (-1, "perplexity of the reference answers"),
    "base PPL": (0, "perplexity of π0 on the plain answers: far above the first row's, it would not have said this"),
    "distinct-2": (0, "different pairs of words over all pairs in the plain answers: near 0, they repeat each other"),
    "BLEU": (1, "of plain answers against the reference ones, 0 to 1; compare rankings only"),
    "tokens": (0, "mean length of plain answers"),
    "finished": (1, "share of plain answers that ended by themselves"),
    "blank": (-1, "number of empty plain answers"),
    "win rate": (1, "share of prompts with a greater reward than the first row's answer; an equal one counts one half"),
}
PERCENT = {"finished", "win rate"}
JUDGE = "judge "
"""Begins the columns of a second reward, which get a table of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A number as text, its interval as text, and whether it is its column's best."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A heading: its name and an arrow to where better is."""

    name: str
    arrow: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """`rows` are (heading, a cell for each column), `notes` (column, meaning); `prompts` their number if it is one."""

    columns: list[Column]
    rows: list[tuple[str, list[Cell]]]
    notes: list[tuple[str, str]]
    prompts: int | None = None


def comparison(rows: Sequence[Mapping[str, Any]], *, judge: bool = False) -> Table | None:
    """Before against after, or None where there is nothing: `rows` of `evaluation.json`, with or without the judge's.

    Values may be ``{"mean", "low", "high", "n"}``; absent ones leave their cell empty.
    """
    prefix = JUDGE if judge else ""
    frame = table(
        [
            {
                key.removeprefix(prefix): v
                for key, v in row.items()
                if key != "policy" and key.startswith(JUDGE) is judge
            }
            for row in rows
        ]
    )
    if frame.empty:
        return None
    counts = list(frame["prompts"]) if "prompts" in frame else []
    same = len(set(counts)) == 1
    if same:
        frame = frame.drop(columns="prompts")
    names = [str(name) for name in frame.columns]
    cells = {name: _column(name, list(frame[name])) for name in names}
    return Table(
        columns=[Column(name=name, arrow={1: "↑", -1: "↓", 0: ""}[_better(name)]) for name in names],
        rows=[(str(row["policy"]), [cells[name][i] for name in names]) for i, row in enumerate(rows)],
        notes=[(name, MEANING[name][1]) for name in names if name in MEANING],
        prompts=counts[0] if same else None,
    )


def headline(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(policy, mean reward, change from the first row) for each row that has a reward; the first's change is empty."""
    means = [(str(row["policy"]), value(row.get("reward"))) for row in rows]
    known = [(policy, mean) for policy, mean in means if not math.isnan(mean)]
    if len(known) < 2 or known[0][0] != means[0][0]:
        return []
    return [(p, number(m, 3), "" if not i else number(m - known[0][1], 3, sign=True)) for i, (p, m) in enumerate(known)]


def rejections(run_dir: Path, pipelines: Sequence[str]) -> Table | None:
    """Rejected prompts, a row a reason, a column a pipeline. Raises DataError where a file is damaged."""
    files = sorted(path for kind in ("rollouts", "pairs") for path in run_dir.glob(f"{kind}/*/rejected.parquet"))
    counts = pd.DataFrame({file.parent.name: Rejected(str(file), read_only=True).counts() for file in files})
    if counts.empty:
        return None
    counts = counts.fillna(0).astype(int)
    order = [name for name in pipelines if name in counts] + [name for name in counts if name not in pipelines]
    counts = counts[order].assign(**{"": counts.sum(axis=1)}).sort_values("", ascending=False, kind="stable")
    return Table(
        columns=[Column(name=str(name) or "total", arrow="") for name in counts.columns],
        rows=[
            (str(reason), [Cell(text=str(n)) for n in row])
            for reason, row in zip(counts.index, counts.to_numpy(), strict=True)
        ],
        notes=[],
    )


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """With a true minus, so that signs are as wide as digits and a column lines up."""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")


def value(cell: object) -> float:
    """The number in a cell, the mean of an interval; NaN where there is none."""
    if isinstance(cell, Mapping):
        cell = cell.get("mean")
    return float(cell) if isinstance(cell, int | float) and math.isfinite(cell) else math.nan


def _column(name: str, cells: list[Any]) -> list[Cell]:
    """Cells of a column with as many digits each, the best marked unless most are as good."""
    values = pd.Series([value(cell) for cell in cells])
    whole = all(isinstance(cell, int) for cell in cells if cell is not None)
    largest = float(values.abs().max())
    digits = 0 if whole else 1 if name in PERCENT else 3 if largest < 10 else 2 if largest < 100 else 1
    better = _better(name)
    best = values.max() if better > 0 else values.min()
    compared = better != 0 and values.nunique() > 1 and 2 * (values == best).sum() <= len(values)

    def shown(x: float) -> str:
        return f"{number(100 * x, digits)} %" if name in PERCENT else number(x, digits)

    return [
        Cell(
            text=shown(x) if not math.isnan(x) else "" if isinstance(cell, Mapping) or cell is None else str(cell),
            interval=_interval(cell, shown),
            best=compared and x == best,
        )
        for cell, x in zip(cells, values, strict=True)
    ]


def _interval(cell: object, shown: Any) -> str:
    bounds = [value(cell.get(side)) for side in ("low", "high")] if isinstance(cell, Mapping) else [math.nan]
    return "" if any(map(math.isnan, bounds)) else f"[{shown(bounds[0])}, {shown(bounds[1])}]"


def _better(name: str) -> int:
    return MEANING.get(name, (0, ""))[0]
