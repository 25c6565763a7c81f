"""The plot of a tuning: held-out reward against the learning rate, a line a rung. `cli.tuning` calls it."""

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plumbline.report.plots import DASHES, INK, NEUTRAL, PALETTE, STYLE
from plumbline.tuning.arms import Arm, shown
from plumbline.tuning.halving import Bounds, Row, fault, reward_of
from plumbline.tuning.ledger import BASE
from plumbline.tuning.series import Outcome


def plot(outcomes: Sequence[Outcome], bounds: Bounds) -> str:
    """An SVG of its own, a panel a pipeline."""
    with mpl.rc_context({**STYLE, "svg.fonttype": "path"}):
        figure = draw(outcomes, bounds)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()


def draw(outcomes: Sequence[Outcome], bounds: Bounds) -> Figure:
    """A cross is an arm that is out, a ring the one that is recommended, the grey line π0."""
    figure = Figure(figsize=(5.4 * len(outcomes), 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, outcome in zip(np.ravel(figure.subplots(1, len(outcomes))), outcomes, strict=True):
        _panel(axes, outcome, bounds)
    return figure


def _panel(axes: Axes, outcome: Outcome, bounds: Bounds) -> None:
    others = list(dict.fromkeys(_others(arm) for arm in outcome.arms))
    for number, rung in enumerate(outcome.rungs):
        assert rung.rows is not None
        color = PALETTE[number % len(PALETTE)]
        for place, other in enumerate(others):
            arms = [arm for arm in outcome.arms if arm.name in rung.arms and _others(arm) == other]
            if not arms:
                continue
            label = ", ".join(filter(None, [f"rung {number}: {rung.steps} steps", other]))
            dash = list(DASHES.values())[place % len(DASHES)]
            _line(axes, arms, rung.rows, bounds, color, dash, label)
        if rung.rows[BASE]:
            axes.axhline(reward_of(rung.rows[BASE]), color=NEUTRAL, linewidth=1, dashes=(3, 2), zorder=0)
    last = outcome.rungs[-1].rows
    if outcome.best and last:
        at = outcome.best.values["lr"], reward_of(last[outcome.best.name])
        axes.plot(*at, "o", markersize=11, fillstyle="none", color=INK, markeredgewidth=1.4)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_xticks(rates := sorted({arm.values["lr"] for arm in outcome.arms}), [shown(rate) for rate in rates])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_title(f"{outcome.section.name}: held-out reward, 95 %", loc="left", fontsize=8.7, color=INK)
    axes.plot([], [], color=NEUTRAL, linewidth=1, dashes=(3, 2), label="π0")
    axes.plot([], [], "x", color=INK, label="out of bounds")
    axes.legend(frameon=False, fontsize=7.5, labelcolor=INK)


def _line(
    axes: Axes,
    arms: Sequence[Arm],
    rows: Mapping[str, Row],
    bounds: Bounds,
    color: str,
    dash: tuple[float, ...],
    label: str,
) -> None:
    """Arms of one rung over their rates; those without a reward are not there."""
    there = sorted((arm for arm in arms if np.isfinite(reward_of(rows[arm.name]))), key=lambda arm: arm.values["lr"])
    x = [arm.values["lr"] for arm in there]
    y, low, high = ([rows[arm.name]["reward"][key] for arm in there] for key in ("mean", "low", "high"))
    axes.plot(x, y, color=color, linewidth=1.5, dashes=dash or (None, None), label=label)
    axes.vlines(x, low, high, color=color, linewidth=1, alpha=0.45)
    for arm, rate, reward in zip(there, x, y, strict=True):
        marker = "x" if fault(rows[arm.name], rows[BASE], bounds) else "o"
        axes.plot(rate, reward, marker, color=color, markersize=6 if marker == "x" else 3.5)


def _others(arm: Arm) -> str:
    """What tells it apart beside its rate."""
    return ", ".join(f"{key} {shown(value)}" for key, value in arm.values.items() if key != "lr")
