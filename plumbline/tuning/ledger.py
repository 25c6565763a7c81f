"""`tune.json`: what a tuning was asked and which rungs it has, so that the same command goes on where one stopped.

`plumbline.tuning.series` keeps it. The runs themselves are in the directories of the rungs.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from plumbline.config.file import parse_config
from plumbline.config.tree import Config
from plumbline.errors import ConfigError, DataError
from plumbline.report.files import read_events
from plumbline.runs.directory import check_same
from plumbline.runs.disk import write_text
from plumbline.tuning.halving import Row, Spent

FILE = "tune.json"
BASE = "before"
"""What an evaluation calls π0."""


@dataclass(slots=True, kw_only=True)
class Rung:
    """A run of some arms side by side.

    Attributes:
        arms: their names.
        seconds: of wall time so far, over all attempts.
        since: when the attempt that is under way began, as `time.time` has it.
        per_step: seconds of a step of all arms, once it is done.
        drawn_per_step: seconds of drawing a step's pairs, of a section that `draws`.
        rows: each arm's figures, and those of ``before``, once it is done.
        drawn: whether the pairs are there that all arms learn from, of a section that `draws`.
    """

    steps: int
    arms: list[str]
    seconds: float = 0.0
    since: float | None = None
    per_step: float = 0.0
    drawn_per_step: float = 0.0
    rows: dict[str, Row] | None = None
    drawn: bool = False

    @property
    def spent(self) -> Spent:
        """What the next rung is planned by."""
        return Spent(
            steps=self.steps,
            arms=len(self.arms),
            seconds=self.seconds,
            per_step=self.per_step,
            drawn_per_step=self.drawn_per_step,
        )


@dataclass(slots=True, kw_only=True)
class Ledger:
    """The rungs of each pipeline, by its name, in order. `save` after every change."""

    directory: Path
    config: Config
    options: Mapping[str, Any]
    rungs: dict[str, list[Rung]] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        """The run directory of the `sft` stage, which makes the π0 that all arms start from."""
        return self.directory / "base"  # which no pipeline is called

    def places(self, name: str, number: int) -> tuple[Path, Path]:
        """The run directories of a pipeline's rung, and of what is drawn for its arms."""
        return self.directory / name / f"rung-{number}", self.directory / name / f"drawn-{number}"

    def save(self) -> None:
        """Write it. Raises DiskError."""
        rungs = {name: [asdict(rung) for rung in own] for name, own in self.rungs.items()}
        tree = {"config": self.config.model_dump(mode="json"), "options": self.options, "rungs": rungs}
        write_text(self.directory / FILE, json.dumps(tree, ensure_ascii=False, indent=1))

    @contextmanager
    def timed(self, rung: Rung) -> Iterator[None]:
        """Around an attempt at a rung: its time counts however it ends."""
        rung.since = time.time()
        self.save()
        began = time.monotonic()
        try:
            yield
        finally:
            rung.seconds += time.monotonic() - began
            rung.since = None
            self.save()


def open_ledger(directory: Path, config: Config, options: Mapping[str, Any]) -> Ledger:
    """Of a new or empty directory, of one where no run has begun, or of the same tuning. Nothing is written.

    Raises:
        ConfigError: the directory holds something else, or was asked something else.
        DataError: `tune.json` is damaged.
    """
    path, again = directory / FILE, "give what was given there, or another --run-dir"
    if not path.exists() and directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ConfigError(f"{directory}: exists and holds no tuning; name another with --run-dir")
    new = Ledger(directory=directory, config=config, options=options)
    if not any((*directory.glob("*/rung-*"), *directory.glob("*/drawn-*"))) and not new.base.exists():
        return new
    try:
        tree = json.loads(path.read_text("utf-8"))
        there, kept = dict(tree["config"]), dict(tree["options"])
        rungs = {name: [_read(rung) for rung in own] for name, own in tree["rungs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: is damaged; name another directory with --run-dir") from None
    check_same(parse_config(there, str(path)), config, str(directory), again)
    now = json.loads(json.dumps(options))
    for key in {**kept, **now}:
        if kept.get(key) != now.get(key):
            raise ConfigError(f"{directory}: --{key} was {kept.get(key)!r} there, is {now.get(key)!r} here; {again}")
    ledger = replace(new, rungs=rungs)
    for name, own in rungs.items():
        for number, rung in enumerate(own):
            if rung.since is not None:  # it was killed: what it did until its last event counts
                events = [
                    one for place in ledger.places(name, number) for one in read_events(place / "events.jsonl")[0]
                ]
                rung.seconds += max((event.get("time") or 0.0 for event in events), default=rung.since) - rung.since
                rung.seconds, rung.since = max(0.0, rung.seconds), None
    return ledger


def _read(tree: Mapping[str, Any]) -> Rung:
    """Raises TypeError or ValueError where it is none."""
    rung = Rung(**tree)
    if not all(math.isfinite(one) for one in (rung.steps, rung.seconds, rung.since or 0, rung.per_step)):
        raise ValueError
    if rung.rows is not None and not {BASE, *rung.arms} <= rung.rows.keys():
        raise ValueError
    return rung
