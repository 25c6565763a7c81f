"""The curves of a run, passed on to experiment trackers: every event that `events.jsonl` gets, while the run goes on.

`pipelines.run` starts the trackers and `pipelines.context.EventLog` feeds them. Each has a thread: one that is slow,
unreachable or broken never holds up the run. One line warns of it and it gets nothing more; `events.jsonl` has all.

A resumed run goes on with the same curves. What came after the last checkpoint is done again, and comes again: in
TensorBoard it replaces what was there, W&B and MLflow cannot replace, so there the first figures of a step stay.
"""

import importlib.util
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from plumbline.config.tracking import Tracking
from plumbline.config.tree import Config
from plumbline.errors import ConfigError, in_one_line
from plumbline.report.files import read_events
from plumbline.tracking.backends import Memory, MlflowTracker, Point, TensorBoard, Tracker, WandbTracker

Event = Mapping[str, Any]

WAITING = 10_000
"""Events that may wait for one tracker; it is off when there are more."""

CLOSING_S = 10.0
"""Seconds that a run's end waits for the trackers to take what they were given."""

NO_FIGURES = ("time", "step", "steps")


def check_tracking(settings: Tracking) -> str:
    """Which trackers a run would have. Raises ConfigError where one is asked for that is not installed."""
    asked = {"wandb": settings.wandb, "mlflow": settings.mlflow}
    for name, section in asked.items():
        if section is not None and not _installed(name):
            raise ConfigError(f"tracking.{name}: {name} is not installed; `pip install {name}`, or take the key out")
    names = [*(["tensorboard"] if settings.tensorboard else []), *(n for n, section in asked.items() if section)]
    return ", ".join(names) or "none but events.jsonl"


def _installed(module: str) -> bool:
    """A directory of that name, such as W&B leaves in a working directory, is found as a module too: it has no file."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """An event's numbers; `step` is None where it stands for no step."""

    pipeline: str
    step: int | None
    time: float
    values: Mapping[str, float]

    @classmethod
    def of(cls, event: Event) -> "Figures":
        """Those of an event that happens now, or when it says."""
        pipeline = event["pipeline"]
        prefix = f"{pipeline}/{event['policy']}" if "policy" in event else pipeline
        values = dict(numbers(event, prefix))
        return cls(pipeline=pipeline, step=event.get("step"), time=event.get("time", time.time()), values=values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewind:
    """The pipeline goes on after `step`."""

    pipeline: str
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Nothing more comes."""

    done: bool


class Trackers:
    """All trackers of a run; empty, it does nothing. As a context manager it closes itself."""

    def __init__(self, feeders: "list[Feeder]") -> None:
        self._feeders = feeders

    def __call__(self, event: Event) -> None:
        """Pass on the numbers of one event; it returns at once."""
        figures = Figures.of(event)
        for feeder in self._feeders if figures.values else []:
            feeder.put(figures)

    def rewind(self, pipeline: str, step: int) -> None:
        """A pipeline starts, or goes on after `step`."""
        for feeder in self._feeders:
            feeder.put(Rewind(pipeline=pipeline, step=step))

    def close(self, done: bool) -> None:
        """Wait, not for long, until all is passed on. `done`: the run has ended well."""
        for feeder in self._feeders:
            feeder.put(End(done=done))
        deadline = time.monotonic() + CLOSING_S
        for feeder in self._feeders:
            feeder.finish(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(done=error is None)


def start_trackers(config: Config, run_dir: Path, listen: Callable[[Event], None]) -> Trackers:
    """Start the trackers that a config asks for; they connect in the background. Warnings go to `listen`.

    One that is new to a run gets the events that there are: the run was begun without it, or on another machine.

    Raises:
        DataError: a line of events.jsonl is broken.
    """
    settings, name = config.tracking, config.name
    tree = config.model_dump(mode="json", exclude_none=True)
    connects: dict[str, Callable[[Memory], Tracker]] = {}
    if settings.tensorboard:
        connects["tensorboard"] = lambda memory: TensorBoard(run_dir / "tensorboard")
    if wandb := settings.wandb:
        connects["wandb"] = lambda memory: WandbTracker(memory, run_dir, name, tree, wandb.project)
    if mlflow := settings.mlflow:
        connects["mlflow"] = lambda memory: MlflowTracker(memory, name, mlflow.uri, mlflow.experiment)
    feeders = []
    for one, connect in connects.items():
        memory = run_dir / ".tracking" / f"{one}.json"
        feeders.append(Feeder(one, connect, memory, [] if memory.exists() else past(run_dir), listen))
        feeders[-1].start()
    return Trackers(feeders)


def past(run_dir: Path) -> list[Figures]:
    """What is in events.jsonl."""
    return [figures for event in read_events(run_dir / "events.jsonl")[0] if (figures := Figures.of(event)).values]


def numbers(event: Event, prefix: str) -> Iterator[tuple[str, float]]:
    """The finite numbers of an event by the names of their curves: `ple/loss`, `pool/shares/ple`."""
    for key, value in event.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}/{key}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or key in NO_FIGURES:
            continue
        elif math.isfinite(value):
            yield f"{prefix}/{key}", float(value)


class Feeder(threading.Thread):
    """One tracker and what waits for it."""

    def __init__(
        self,
        name: str,
        connect: Callable[[Memory], Tracker],
        memory: Path,
        past: Sequence[Figures],
        listen: Callable[[Event], None],
    ) -> None:
        super().__init__(name=f"tracking-{name}", daemon=True)
        self._tracker_name, self._connect, self._memory, self._listen = name, connect, memory, listen
        self._past = past
        self._queue: queue.Queue[Figures | Rewind | End] = queue.Queue(WAITING)
        self._off = False
        self._sent: dict[str, range] = {}  # steps that are done again, of which the tracker has the first figures

    def put(self, item: Figures | Rewind | End) -> None:
        """Leave it for the tracker, where that is not off."""
        if self._off:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._turn_off(f"{WAITING} events wait for it")

    def finish(self, timeout: float) -> None:
        """Wait until all is passed on; what is not within `timeout` seconds is warned of and given up."""
        if not self._off:
            self.join(timeout)
        if self.is_alive():
            self._turn_off("it did not take its last events in time")

    def run(self) -> None:
        """Connect, then pass on what comes until the end."""
        try:
            memory = Memory.load(self._memory)
            tracker = self._connect(memory)
            memory.started = min((figures.time for figures in self._past), default=memory.started)
            for figures in self._past:
                self._pass_on(tracker, memory, figures)
            memory.save()
            while not isinstance(item := self._queue.get(), End):
                if self._off:
                    return
                self._pass_on(tracker, memory, item)
                memory.save()
            tracker.close(item.done)
        except Exception as error:  # whatever a tracker's library raises, the run goes on
            self._turn_off(in_one_line(error))

    def _pass_on(self, tracker: Tracker, memory: Memory, item: Figures | Rewind) -> None:
        last = memory.steps.get(item.pipeline)
        if isinstance(item, Rewind):
            tracker.rewind(item.pipeline, item.step)
            if not tracker.overwrites:
                self._sent[item.pipeline] = range(item.step + 1, (last or 0) + 1)
            memory.steps[item.pipeline] = item.step if tracker.overwrites else max(item.step, last or 0)
        elif item.step not in self._sent.get(item.pipeline, ()):
            # What belongs to no step, such as a promotion, stands at the newest one of its pipeline.
            at = last if item.step is None else item.step
            tracker.log(
                Point(
                    pipeline=item.pipeline,
                    axis="second" if at is None else "step",
                    at=int(item.time - memory.started) if at is None else at,
                    time=item.time,
                    figures=item.values,
                )
            )
            if item.step is not None:
                memory.steps[item.pipeline] = max(item.step, last or 0)

    def _turn_off(self, reason: str) -> None:
        if not self._off:
            self._off = True
            self._listen(
                {"message": f"tracking: {self._tracker_name} is off: {reason}; the run goes on, events.jsonl has all"}
            )
