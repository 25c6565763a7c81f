"""The picture in README.md: what the events of a run of `configs/quickstart.yaml` say of its three methods.

    python benchmarks/methods.py --seeds 0 --configs quickstart
    python benchmarks/curves.py runs/methods/quickstart-0 docs/curves.svg

Only PLE samples its own policy in every step, so only its true reward is known by step. Of DLMA and Self-Contrast,
which train on answers of π0, the events have DPO's margin h: by how many nats more than π0 the policy prefers a pair's
chosen answer. How far the ground truth agrees, and what the run's comparison on held-out prompts found, stands over
the curves.

Dots are steps, lines means of five. The figure has no background, and its ink is readable on white and on black.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from worlds import comparison, events

from plumbline.report.plots import DASHES, STYLE, colors, running_mean

INK = "#737c87"
"""More than 4 to 1 against white and against GitHub's black alike."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Of a method's events the figures that are drawn, solid and dashed; `note` is told the mean of `share`, if any."""

    title: str
    figures: tuple[str, ...]
    note: str
    share: str | None = None


PANELS = {
    "ple": Panel(
        "PLE: true reward of its answers", ("reward_plain", "reward_guided"), "dashed: asked with the principle"
    ),
    "dlma": Panel(
        "DLMA: lead over π0 on its pairs, nats", ("margin",), "the sign of R is right in {:.0f} %", "agreement"
    ),
    "self_contrast": Panel(
        "Self-Contrast: lead over π0 on its pairs, nats",
        ("margin",),
        "{:.0f} % of its negatives truly worse",
        "data_accuracy",
    ),
}


def draw(run_dir: Path) -> Figure:
    """The three panels."""
    rewards = {row["policy"]: row["reward"]["mean"] for row in comparison(run_dir)}
    before = next(iter(rewards.values()))
    colored = colors(list(PANELS))
    figure = Figure(figsize=(10.2, 3.3), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, (name, panel) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        rows = events(run_dir, name)
        for key, dash in zip(panel.figures, ("solid", "dashed"), strict=False):
            line(axes, rows, key, colored[name], DASHES[dash])
        shares = [100 * row[panel.share] for row in rows if panel.share and row.get(panel.share) is not None]
        note = panel.note.format(fmean(shares)) if shares else panel.note
        reward = f"held-out true reward {signed(before)} → {signed(rewards[name])}"
        axes.set_title(f"{panel.title}\n{note}\n{reward}", loc="left", fontsize=9.5, linespacing=1.35)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6))
    return figure


def signed(value: float) -> str:
    """Two digits and a true minus."""
    return f"{value:+.2f}".replace("-", "−")


def line(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, color: str, dashes: tuple[float, ...]) -> None:
    """Dots and their running mean."""
    there = [row for row in rows if row.get(key) is not None]
    x, y = (np.array([row[figure] for row in there], dtype=np.float64) for figure in ("step", key))
    axes.plot(x, y, "o", color=color, alpha=0.5, markersize=2.4, markeredgewidth=0)
    axes.plot(x, running_mean(y), color=color, linewidth=1.8, dashes=dashes or (None, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path, help="an .svg or .png")
    options = parser.parse_args()
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color", "xtick.color", "xtick.labelcolor")
    style = {**STYLE, **dict.fromkeys((*inked, "ytick.labelcolor"), INK), "grid.alpha": 0.35, "svg.fonttype": "path"}
    with mpl.rc_context(style):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if options.out.suffix == ".svg" else None
        draw(options.run_dir).savefig(options.out, transparent=True, dpi=150, metadata=metadata)


if __name__ == "__main__":
    main()
