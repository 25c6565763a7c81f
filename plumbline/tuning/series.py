"""The rungs of a tuning, one after another: arms side by side in one ordinary run, the better half in a longer one.

`cli.tuning` calls `tune`, and hands it what starts a run. A rung starts anew, with more steps, rather than going on: a
schedule is of all of a run's steps. What is done stands in the ledger and in the rungs' own directories, and is not
done again.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path

from plumbline.config.tree import Config
from plumbline.errors import RunError
from plumbline.records import PolicyRef
from plumbline.report.files import read_events
from plumbline.runs.policies import version_directory, versions
from plumbline.tuning.arms import Arm, Tuned, TuningData, arms_of, base_config, draw_config, draws, rung_config
from plumbline.tuning.halving import TELLING, Bounds, Row, all_go_on, half, next_steps, reward_of, sound
from plumbline.tuning.ledger import BASE, Ledger, Rung


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all pipelines' rungs have in common.

    Attributes:
        over: values by keys, in place of the default rates.
        budget: seconds of each pipeline.
        full: steps that the config has, by pipeline.
    """

    over: Mapping[str, Sequence[float]]
    bounds: Bounds
    budget: float
    data: TuningData
    full: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A pipeline's rungs, who was left after each (the best first), and the one to take, if any.

    Attributes:
        full: steps that the config has.
        sound: arms of the last rung that are not out.
    """

    section: Tuned
    full: int
    arms: Sequence[Arm]
    rungs: Sequence[Rung]
    left: Sequence[Sequence[Arm]]
    sound: Sequence[Arm]

    @property
    def highest(self) -> Arm | None:
        """Of the last rung the arm with the highest reward, of those that are not out."""
        return next(iter(self.left[-1]), None)

    @property
    def short(self) -> bool:
        """Whether the last rung had so few of the config's steps that its verdict favours rates that are too high."""
        return self.rungs[-1].steps * TELLING < self.full and len(self.left[-1]) > 1

    @property
    def best(self) -> Arm | None:
        """What to take: the highest, or where the last rung was too short to tell, the one with the next lower
        rate. One next to the best rate is still good, and one above it may collapse."""
        if self.highest is None or not self.short:
            return self.highest
        rate, others = self.highest.values["lr"], {**self.highest.values, "lr": None}
        lower = [arm for arm in self.sound if arm.values["lr"] < rate and {**arm.values, "lr": None} == others]
        return max(lower, key=lambda arm: arm.values["lr"], default=self.highest)

    @property
    def seconds(self) -> float:
        """Wall time of all rungs."""
        return sum(rung.seconds for rung in self.rungs)


def tune(
    ledger: Ledger, section: Tuned, plan: Plan, start: Callable[[Config, Path], None], say: Callable[[str], None]
) -> Outcome:
    """All rungs of a pipeline that the budget has room for; those that the ledger has are only read.

    Args:
        start: runs a config in a directory, from where it stands there to its end.
        say: shows a line.

    Raises:
        UserError: a rung's config cannot be run.
        RunError: a run ended early, for another reason than an arm's; the same call goes on.
    """
    arms = arms_of(section, plan.over)
    rungs = ledger.rungs.setdefault(section.name, [])
    left: list[list[Arm]] = []
    there: list[Arm] = []
    going, full = arms, plan.full[section.name]
    for number in count():
        if number == len(rungs):
            done = [rung.spent for rung in rungs]
            steps = next_steps(done, len(going), full, plan.budget) if len(going) > 1 else None
            if steps is None:
                break
            rungs.append(Rung(steps=steps, arms=[arm.name for arm in going]))
        rung = rungs[number]
        if rung.rows is None:
            say(
                f"{section.name} rung {number}: {len(going)} arms, {rung.steps} steps; "
                f"{_clock(plan.budget - sum(one.seconds for one in rungs))} of the budget left"
            )
            _run(ledger, section, plan, number, going, start)
        assert rung.rows is not None
        base = rung.rows[BASE]
        there = sound(rung.rows, going, base, plan.bounds)
        every = all_go_on([one.spent for one in rungs[: number + 1]], len(there), full, plan.budget)
        going = there if every else there[: half(len(going))]
        left.append(going)
        say(_told(section, number, rung, going, base))
    return Outcome(section=section, full=full, arms=arms, rungs=rungs, left=left, sound=there)


def _run(
    ledger: Ledger,
    section: Tuned,
    plan: Plan,
    number: int,
    arms: Sequence[Arm],
    start: Callable[[Config, Path], None],
) -> None:
    """A rung to its end, and its figures into the ledger. Raises as `tune`."""
    rung, directory, drawn = ledger.rungs[section.name][number], *ledger.places(section.name, number)
    full, pairs = plan.full[section.name], drawn / "pairs" / section.name if draws(section) else None
    base = _base(ledger, plan, start)
    if pairs and not rung.drawn:
        with ledger.timed(rung):
            start(draw_config(ledger.config, section, rung.steps, plan.data, base), drawn)
            rung.drawn = True
    config = rung_config(ledger.config, section, arms, rung.steps, full, plan.data, base, pairs)
    rows = figures(directory, rung.arms)
    if rows is None:
        with ledger.timed(rung):
            try:
                start(config, directory)
            except RunError:
                if figures(directory, rung.arms) is None:  # else arms failed, and the others are known
                    raise
        rows = figures(directory, rung.arms)
    if rows is None:
        raise RunError(f"{directory}: its evaluation is without some of its arms; remove the directory")
    rung.rows, rung.per_step = rows, seconds_a_step(directory, rung)
    if pairs:
        rung.drawn_per_step = seconds_a_step(drawn, replace(rung, arms=[section.name]))
    ledger.save()


def _base(ledger: Ledger, plan: Plan, start: Callable[[Config, Path], None]) -> str | None:
    """The directory of the π0 that the `sft` stage makes, once for all pipelines and within no budget; None without."""
    stage = ledger.config.sft
    if stage is None:
        return None
    if not versions(ledger.base, stage.name):
        start(base_config(ledger.config, plan.data), ledger.base)
    return str(
        version_directory(ledger.base, PolicyRef(policy=stage.name, version=versions(ledger.base, stage.name)[-1]))
    )


def figures(run_dir: Path, names: Sequence[str]) -> dict[str, Row] | None:
    """Rows of arms and of `BASE` in a run's evaluation, or why an arm failed; None where one is yet to be known."""
    path = run_dir / "evaluation.json"
    found = {row["policy"]: row for row in json.loads(path.read_text("utf-8"))["rows"]} if path.exists() else {}
    ends = {event["pipeline"]: event for event in read_events(run_dir / "events.jsonl")[0]}
    rows: dict[str, Row] = {BASE: found.get(BASE, {})}
    for name in names:
        if error := ends.get(name, {}).get("error"):
            rows[name] = {"failed": error}
        elif name in found:
            rows[name] = found[name]
        else:
            return None
    return rows


def seconds_a_step(run_dir: Path, rung: Rung) -> float:
    """Of the slowest arm, by the times of its events: their median, for a run may have been interrupted."""
    events = read_events(run_dir / "events.jsonl")[0]
    found = [0.0]
    for name in rung.arms:
        times = [event["time"] for event in events if event["pipeline"] == name and "step" in event]
        if len(times) > 1:  # of several epochs there are more than steps
            found.append(statistics.median(b - a for a, b in pairwise(times)) * len(times) / rung.steps)
    return max(found) or rung.seconds / rung.steps


def _told(section: Tuned, number: int, rung: Rung, going: Sequence[Arm], base: Row) -> str:
    """A rung in a line."""
    assert rung.rows is not None
    if not going:
        return f"{section.name} rung {number}: all {len(rung.arms)} arms failed or are out of bounds"
    best = going[0]
    return (
        f"{section.name} rung {number}: {_clock(rung.seconds)}, {rung.steps} steps; best {best} with reward "
        f"{reward_of(rung.rows[best.name]):+.3f} (π0 {reward_of(base):+.3f}); left: {'; '.join(map(str, going))}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(abs(seconds)), 60)
    return f"{'-' if seconds < 0 else ''}{minutes}:{rest:02d}"
