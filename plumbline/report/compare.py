"""Runs beside each other on one page: held-out rewards and their differences, curves over each other, configs.

`plumbline compare RUN_A RUN_B` calls `compare_runs`. The first run is what the others are compared with.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plumbline.errors import UserError
from plumbline.methods.evaluation import Interval, markdown, paired_interval, reward_win_rate
from plumbline.report.files import Event, check_run, read_config, read_evaluation, read_events
from plumbline.report.pages import render_page, write_page
from plumbline.report.plots import BESIDE, NEUTRAL, colors, overlaid
from plumbline.report.tables import Cell, Column, Table, comparison, number, value
from plumbline.runs.directory import leaves

BASES = {"before", "base"}
"""What evaluations call π0: of two runs it is compared with itself alone."""
ABSENT = "not there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run as its files have it; `label` is what it is called here."""

    label: str
    path: Path
    config: Mapping[str, Any]
    events: Sequence[Event]
    cut: bool
    evaluation: Mapping[str, Any] | None

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """Its evaluated policies."""
        return self.evaluation["rows"] if self.evaluation else []

    @property
    def keys(self) -> Sequence[str]:
        """Of the prompts that it was evaluated on."""
        return self.evaluation["prompts"] if self.evaluation else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """`ours` of `run` minus `theirs` of the first one: mean reward on the prompts of both, paired, and who wins."""

    run: str
    what: str
    reward: Interval
    wins: float


def compare_runs(paths: Sequence[Path], out: Path) -> str:
    """Write the page; returns what the terminal shows of it.

    Raises:
        UserError: a path is no run or is named twice, or the page cannot be written.
        ConfigError, DataError: a file of a run is broken.
    """
    runs = read_runs(paths)
    if out.suffix != ".html" or out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out}: should be a file that ends in .html, in a directory that is there")
    differences = [one for run in runs[1:] for one in paired(runs[0], run)]
    notices = list(_notices(runs))
    alike = not _rewards_differ(runs) and len({tuple(sorted(run.keys)) for run in runs if run.rows}) == 1
    names = dict.fromkeys(e["pipeline"] for run in runs for e in run.events if e["pipeline"] not in BESIDE)
    rows = [
        {**{k: v for k, v in row.items() if k != "win rate"}, "policy": f"{run.label}: {row['policy']}"}
        for run in runs
        for row in run.rows
    ]
    colored = colors([run.label for run in runs])
    page = render_page(
        "compare.html.j2",
        kicker="Plumbline comparison",
        name=" · ".join(run.label for run in runs),
        state="",
        balance="",
        watched="",
        notices=notices,
        runs=[(run.label, str(run.path), _progress(run), len(run.keys)) for run in runs],
        tables=[table for judge in (False, True) if (table := _marked(comparison(rows, judge=judge), alike))],
        differences=_table(differences),
        first=runs[0].label,
        plots=overlaid({run.label: run.events for run in runs}, list(names)),
        configs=config_differences(runs),
        color_of=lambda who: colored.get(who, colored.get(who.partition(": ")[0], NEUTRAL)),
    )
    write_page(out, page)
    return "\n\n".join(_terminal(rows, differences, notices))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Raises as `compare_runs`."""
    named = [path.resolve() for path in paths]
    for i, path in enumerate(paths):
        check_run(path)
        if named[i] in named[:i]:
            raise UserError(f"{path}: is named twice; name two runs or more")
    short = Counter(path.name for path in named)
    runs = []
    for path, whole in zip(paths, named, strict=True):
        config, _ = read_config(path / "config.yaml")
        events, cut = read_events(path / "events.jsonl")
        runs.append(
            Run(
                label=whole.name if short[whole.name] == 1 else str(path),
                path=path,
                config=config,
                events=events,
                cut=cut,
                evaluation=read_evaluation(path / "evaluation.json"),
            )
        )
    return runs


def paired(first: Run, other: Run) -> Iterator[Difference]:
    """Every policy of `other` against every one of `first`, π0 against π0, where both were asked the same prompts."""
    for ours in _rewards(other):
        for theirs in _rewards(first):
            if (ours in BASES) != (theirs in BASES):
                continue
            there, here = _rewards(first)[theirs], _rewards(other)[ours]
            both = [(there[key], here[key]) for key in here if key in there]
            if both:
                before, after = zip(*both, strict=True)
                yield Difference(
                    run=other.label,
                    what=f"{other.label}: {ours} − {first.label}: {theirs}",
                    reward=paired_interval(before, after),
                    wins=reward_win_rate(after, before),
                )


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(dotted key, a value for each run) of the keys that differ; pipelines are known by their names."""
    trees = [dict(leaves({**run.config, "pipelines": _by_name(run.config["pipelines"])})) for run in runs]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    found = [(key, [_setting(tree[key]) if key in tree else ABSENT for tree in trees]) for key in keys]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def _by_name(pipelines: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {str(one.get("name") or one.get("type")): one for one in pipelines}


def _setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _rewards(run: Run) -> dict[str, dict[tuple[str, int], float]]:
    """Of each policy, by prompt; one that is asked several times is told apart by how often it came before."""
    seen: Counter[str] = Counter()
    places = []
    for key in run.keys:
        places.append((key, seen[key]))
        seen[key] += 1
    rewards = run.evaluation["rewards"] if run.evaluation and places else {}
    return {
        who: {place: one for place, one in zip(places, values, strict=True) if not math.isnan(value(one))}
        for who, values in rewards.items()
    }


def _rewards_differ(runs: Sequence[Run]) -> bool:
    rewards = [run.config.get("reward") for run in runs if run.rows]
    return any(reward != rewards[0] for reward in rewards)


def _notices(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """(kind, text): what a reader has to know before any number."""
    first = runs[0]
    for run in runs:
        if run.evaluation is None:
            yield "unfinished", f"{run.label}: not evaluated; `plumbline evaluate {run.path}` does it."
        elif not any(_rewards(run).values()):
            anew = f"`plumbline evaluate {run.path}` makes it anew"
            yield "unfinished", f"{run.label}: its evaluation.json has no rewards by prompt to be paired; {anew}."
        elif run is not first and any(_rewards(first).values()):
            common = sum((Counter(run.keys) & Counter(first.keys)).values())
            if not common:
                yield "unfinished", f"{run.label}: no prompt in common with {first.label}, and so no differences."
            elif common < max(len(run.keys), len(first.keys)):
                told = (
                    f"{common} of its {len(run.keys)} held-out prompts are among the {len(first.keys)} of {first.label}"
                )
                yield "unfinished", f"{run.label}: {told}; differences are over these, means over all of a run."
        if run.cut:
            yield "unfinished", f"{run.label}: the last line of events.jsonl is half-written and left out."
    if _rewards_differ(runs):
        yield "unfinished", "The runs have different rewards: their numbers are of different scales."


def _progress(run: Run) -> str:
    """How far each pipeline came."""
    last = {e["pipeline"]: e for e in run.events if e.get("step") and e["pipeline"] not in BESIDE}
    return ", ".join(f"{name} {e['step']} of {e.get('steps') or '?'}" for name, e in last.items()) or "no step yet"


def _marked(table: Table | None, alike: bool) -> Table | None:
    """Without marks of the best where columns compare numbers over different prompts or rewards."""
    if table is None or alike:
        return table
    return replace(table, rows=[(who, [replace(cell, best=False) for cell in cells]) for who, cells in table.rows])


def _table(differences: Sequence[Difference]) -> Table | None:
    """Bold where the interval does not hold 0."""
    if not differences:
        return None
    names = ("prompts", "difference of mean rewards", "wins")
    rows = []
    for one in differences:
        low, high = (number(bound, 3, sign=True) for bound in (one.reward.low, one.reward.high))
        mean = Cell(
            text=number(one.reward.mean, 3, sign=True),
            interval=f"[{low}, {high}]" if one.reward.n > 1 else "",
            best=not one.reward.low <= 0 <= one.reward.high and one.reward.n > 1,
        )
        rows.append((one.what, [Cell(text=str(one.reward.n)), mean, Cell(text=f"{100 * one.wins:.1f} %")]))
    return Table(columns=[Column(name=name, arrow="") for name in names], rows=rows, notes=[])


def _terminal(
    rows: Sequence[Mapping[str, Any]], differences: Sequence[Difference], notices: Sequence[tuple[str, str]]
) -> Iterator[str]:
    if rows:
        yield markdown([{k: _interval(v) if isinstance(v, Mapping) else v for k, v in row.items()} for row in rows])
    if differences:
        yield markdown(
            [
                {"difference": one.what, "prompts": one.reward.n, "reward": one.reward, "wins": one.wins}
                for one in differences
            ]
        )
    if notices:
        yield "\n".join(text for _, text in notices)


def _interval(cell: Mapping[str, Any]) -> Interval | None:
    mean, low, high = (value(cell.get(side)) for side in ("mean", "low", "high"))
    return None if math.isnan(mean) else Interval(mean=mean, low=low, high=high, n=0)
