"""The curves of a run as inline SVG, drawn as `plumbline.report.kinds` says.

Called by `plumbline.report.page` and `plumbline.report.compare`. No text of a user enters an SVG: names stand in the
legends, which the page escapes.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from plumbline.report.kinds import KINDS, Kind, kinds_of_parts

Event = Mapping[str, Any]
POOL = "pool"
BESIDE = {POOL, "fleet", "serve"}
"""What events name that are no pipeline's: the pool, generators that join and leave, the endpoint."""
INK, EDGE, GRID = "#4b5563", "#9ca3af", "#e5e7eb"
BAND, LAYER = 0.16, 0.75
NEUTRAL = "#6b7280"
"""What is no pipeline's: the pool as a whole, the model before."""
# Told apart with any common colour blindness (Okabe and Ito's, some darkened for a white page).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b3589a", "#8a6d00", "#3a9bd9")
DASHES: Mapping[str, tuple[float, ...]] = {"solid": (), "dashed": (4.0, 2.0), "dotted": (1.2, 1.8)}
MOST_POINTS = 400
"""Of a line; the steps of a longer run are averaged, and the caption says so."""
WIDTH, SMALL = 5.0, 3.2
"""Inches of a chart that stands beside one other, and beside two; the page shows them larger, paper smaller."""
WINDOW = 5
"""Events of a running mean."""
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": EDGE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": ["DejaVu Sans"],  # it comes with matplotlib: the same measures, and so the same SVG, everywhere
    "font.size": 8.7,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "plumbline",
    "text.parse_math": False,
    "xtick.color": EDGE,
    "xtick.labelcolor": INK,
    "xtick.major.size": 3.0,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An entry of a legend: a line where `dasharray` is given, over a field of `opacity`."""

    label: str
    color: str
    dasharray: str | None = None
    opacity: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A figure: `y` [N] over `x` [N], NaN where there is none; `low` and `high` [N] bound a band around it.

    `dots` [N] are what `y` is the running mean of; `each` steps have been averaged to one of N.
    """

    figure: str
    label: str
    color: str
    dash: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    dots: np.ndarray | None = None
    each: int = 1

    @property
    def key(self) -> Key:
        """Its entry in the legend."""
        dasharray = " ".join(f"{2 * length:g}" for length in DASHES[self.dash]) or "none"
        return Key(label=self.label, color=self.color, dasharray=dasharray, opacity=0.0 if self.low is None else BAND)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One SVG and what is in it."""

    svg: Markup
    legend: Sequence[Key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Charts under one title; `caption` says what to look for."""

    title: str
    caption: str
    charts: Sequence[Chart]


def colors(names: Sequence[str]) -> dict[str, str]:
    """A colour for each pipeline, the same all over the page."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def plots(events: Sequence[Event], pipelines: Sequence[str]) -> list[Plot]:
    """Every plot that has something in it, in the order of `KINDS`; those of several charts come last.

    Args:
        events: lines of `events.jsonl`, whose figures are numbers or None.
        pipelines: the names, in the order of their colours.
    """
    clock = Clock(events)
    kinds = [*KINDS, *kinds_of_parts(dict.fromkeys(figure for event in events for figure in event))]
    with mpl.rc_context(STYLE):
        drawn = [_plot(kind, events, {**colors(pipelines), POOL: NEUTRAL}, clock) for kind in kinds]
        drawn.append(_pool_shares(events, pipelines, clock))
    there = [plot for plot in drawn if plot is not None]
    return sorted(there, key=lambda plot: len(plot.charts) > 1)  # wide ones last: the others stand in pairs


def overlaid(runs: Mapping[str, Sequence[Event]], pipelines: Sequence[str]) -> list[Plot]:
    """Rewards by step, a plot for each pipeline, in which each run has its lines; its colour is that of its place.

    Args:
        runs: their events, by what they are called.
        pipelines: the names of which there are plots.
    """
    drawn = []
    with mpl.rc_context(STYLE):
        for place, name in enumerate(pipelines):
            own = [{**e, "pipeline": run} for run, events in runs.items() for e in events if e["pipeline"] == name]
            for kind in KINDS:
                if kind.figures[0].startswith("reward_"):
                    plot = _plot(kind, own, colors(list(runs)), Clock(own), f"p{place}-")
                    drawn += [replace(plot, title=f"{name}: {plot.title}")] if plot else []
    return drawn


class Clock:
    """Time since the first event, in a unit that fits how long the run took."""

    def __init__(self, events: Sequence[Event]) -> None:
        stamps = _numbers(events, "time")
        stamps = stamps[np.isfinite(stamps)]
        self._start, span = (stamps.min(), np.ptp(stamps)) if stamps.size else (0.0, 0.0)
        self._seconds, unit = (3600, "hours") if span > 7200 else (60, "minutes") if span > 120 else (1, "seconds")
        self.label = f"{unit} since the first event"

    def __call__(self, events: Sequence[Event]) -> np.ndarray:
        return (_numbers(events, "time") - self._start) / self._seconds


def _plot(
    kind: Kind, events: Sequence[Event], colored: Mapping[str, str], clock: Clock, prefix: str = ""
) -> Plot | None:
    """The plot of a kind, or None where no event has a figure of it; `prefix` tells its ids from another's."""
    by_name = {name: [e for e in events if e.get("pipeline") == name] for name in colored}
    groups = [_lines(kind, name, colored[name], rows, clock) for name, rows in by_name.items()]
    if not any(groups):
        return None
    groups = [group for group in groups if group] if kind.apart else [[line for group in groups for line in group]]
    drawn = [line for group in groups for line in group]
    said = [text for figure, text in kind.captions if any(line.figure.startswith(figure) for line in drawn)]
    if (each := max(line.each for line in drawn)) > 1:
        said.append(f"A point is the mean of {each} steps.")
    if any(line.dots is not None for line in drawn):
        said.append(f"Dots: steps. Lines: means of {WINDOW}.")
    size = (SMALL, 1.9) if len(groups) > 2 and len(groups) != 4 else (WIDTH, 1.9) if len(groups) > 1 else (WIDTH, 2.4)
    charts = []
    for number, group in enumerate(groups):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for line in group:
            _draw(axes, line)
        _dress(axes, kind.unit, clock.label if kind.over_time else "step", share=kind.share, steps=not kind.over_time)
        svg = _svg(figure, f"{prefix}{kind.figures[0]}{number}", kind.title)
        charts.append(Chart(svg=svg, legend=[line.key for line in group]))
    return Plot(title=kind.title, caption=" ".join(dict.fromkeys(said)), charts=charts)


def _lines(kind: Kind, name: str, color: str, rows: Sequence[Event], clock: Clock) -> list[Line]:
    """What one pipeline has of a kind."""
    x = clock(rows) if kind.over_time else _numbers(rows, "step")
    order = np.argsort(x, kind="stable")  # parts that are only made end in any order
    lines = []
    for curve in kind.curves:
        y = _numbers(rows, curve.figure)
        if not np.isfinite(x * y).any():
            continue
        band = [_numbers(rows, figure) for figure in (curve.low, curve.high) if figure]
        thin, each = averaged(np.column_stack([x, y, *band])[order])
        mean = running_mean(thin[:, 1]) if kind.over_time and len(thin) > 2 * WINDOW else None
        whole = bool(band) and np.isfinite(thin[:, 2:]).all(axis=1).any()
        lines.append(
            Line(
                figure=curve.figure,
                label=f"{name} {curve.label}".strip(),
                color=color,
                dash=curve.dash,
                x=thin[:, 0],
                y=thin[:, 1] if mean is None else mean,
                low=thin[:, 2] if whole else None,
                high=thin[:, 3] if whole else None,
                dots=None if mean is None else thin[:, 1],
                each=each,
            )
        )
    return lines


def _pool_shares(events: Sequence[Event], pipelines: Sequence[str], clock: Clock) -> Plot | None:
    """How the pool's tokens were divided: a stack, one layer a pipeline."""
    rows = [e for e in events if e.get("pipeline") == POOL and e.get("shares") and e.get("time") is not None]
    if len(rows) < 2:  # an area needs two points
        return None
    shares = [row["shares"] for row in rows]
    there = dict.fromkeys(name for share in shares for name in share)
    names = [*(n for n in pipelines if n in there), *(n for n in there if n not in pipelines)]
    layers = [np.nan_to_num(_numbers(shares, name)) for name in names]
    thin, _ = averaged(np.column_stack([clock(rows), *layers]))
    colored = {**dict.fromkeys(names, NEUTRAL), **colors(pipelines)}
    figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
    axes = figure.subplots()
    fills = [colored[name] for name in names]
    axes.stackplot(thin[:, 0], *thin[:, 1:].T, colors=fills, alpha=LAYER, edgecolor="white", linewidth=0.8)
    _dress(axes, "share of the tokens so far", clock.label, share=True, steps=False)
    title = "How the pool was shared"
    return Plot(
        title=title,
        caption="While all of them want tokens, the layers should stand in the ratio of their `share` settings.",
        charts=[
            Chart(
                svg=_svg(figure, "pool_shares", title),
                legend=[Key(label=name, color=colored[name], opacity=LAYER) for name in names],
            )
        ],
    )


def _numbers(events: Sequence[Event], figure: str) -> np.ndarray:
    """A figure of each event [N]; what is absent or not finite is NaN."""
    values = np.array([np.nan if (v := event.get(figure)) is None else v for event in events], dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def averaged(rows: np.ndarray) -> tuple[np.ndarray, int]:
    """At most MOST_POINTS of [N, C] rows, each the mean of as many neighbours; and how many those are."""
    each = -(-len(rows) // MOST_POINTS)
    if each <= 1:
        return rows, 1
    starts = range(0, len(rows), each)
    there = np.isfinite(rows)
    total, count = (np.add.reduceat(part, starts) for part in (np.where(there, rows, 0.0), there.astype(np.int64)))
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0), each


def running_mean(y: np.ndarray) -> np.ndarray:
    """Mean of what is there in a centred window of each of [N]; NaN stays NaN."""
    there = np.isfinite(y)
    total, count = (np.convolve(part, np.ones(WINDOW), "same") for part in (np.where(there, y, 0.0), there))
    return np.where(there, total / np.maximum(count, 1), np.nan)


def _draw(axes: Axes, line: Line) -> None:
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=line.color, alpha=BAND, linewidth=0)
    if line.dots is not None:
        axes.plot(line.x, line.dots, "o", color=line.color, alpha=0.35, markersize=1.8, markeredgewidth=0)
    axes.plot(line.x, line.y, color=line.color, linewidth=1.5, dashes=DASHES[line.dash] or (None, None))
    there = np.pad(np.isfinite(line.x * line.y), 1)
    alone = there[1:-1] & ~there[:-2] & ~there[2:]  # no line goes through such a point
    axes.plot(line.x[alone], line.y[alone], "o", color=line.color, markersize=3.5, markeredgewidth=0)


def _dress(axes: Axes, unit: str, label: str, *, share: bool, steps: bool) -> None:
    """Axes with their units; the upper one lies flat, over its axis, where it is read first."""
    axes.set_xlabel(label)
    axes.set_title(unit, loc="left", fontsize=8.7, color=INK, pad=6)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=steps))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if share:
        axes.set_ylim(-0.02, 1.02)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def _svg(figure: Figure, key: str, title: str) -> Markup:
    """The figure to be put into HTML: no links, its ids its own, its font the page's, as wide as its place."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would hold for the page; the page has it
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(r' width="[^"]*pt" height="[^"]*pt"', f' role="img" aria-label="{title}"', text, count=1)
    return Markup(text)
