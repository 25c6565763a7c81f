"""Experiment trackers behind one seam: TensorBoard, Weights & Biases, MLflow. `plumbline.tracking.feed` feeds them.

Each is imported when a run asks for it, is called from one thread, and may raise whatever its library does.
"""

import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Figures of one pipeline at one place of its axis: step `at`, or second `at` of the run.

    `time` is Unix time; `figures` have the names that curves get, such as `ple/reward_plain`.
    """

    pipeline: str
    axis: Literal["step", "second"]
    at: int
    time: float
    figures: Mapping[str, float]


class Tracker(Protocol):
    """Where curves go.

    Attributes:
        overwrites: a point after `rewind` takes the place of what was there; else each step is to come once.
    """

    overwrites: bool

    def rewind(self, pipeline: str, step: int) -> None:
        """The pipeline goes on after `step`: later ones that are there will come again."""
        ...

    def log(self, point: Point) -> None: ...

    def close(self, done: bool) -> None:
        """The run has ended, `done` or on its way: it may be resumed."""
        ...


@dataclass(slots=True)
class Memory:
    """What a tracker must know again when the run is resumed: its `id` over there, when it `started` (Unix time), and
    the last step of each pipeline that it was given."""

    path: Path
    id: str = ""
    started: float = field(default_factory=lambda: time.time())
    steps: dict[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "Memory":
        """From its file, or a new one where there is none."""
        return cls(path, **json.loads(path.read_text("utf-8"))) if path.exists() else cls(path)

    def save(self) -> None:
        kept = asdict(self)
        del kept["path"]
        self.path.parent.mkdir(exist_ok=True)
        aside = self.path.with_suffix(".aside")
        aside.write_text(json.dumps(kept), encoding="utf-8")
        os.replace(aside, self.path)


class TensorBoard:
    """Event files, a directory a pipeline: a rewind purges by step, and would purge the other pipelines' steps too.

    Made of the parts of TensorBoard's own writer, which cannot purge; others that can load torch.
    """

    overwrites = True

    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._open = EventFileWriter
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._directory = directory
        self._writers: dict[str, Any] = {}

    def rewind(self, pipeline: str, step: int) -> None:
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._add(pipeline, time.time(), step + 1, session_log=start)

    def log(self, point: Point) -> None:
        summary = self._summaries.Summary
        values = [summary.Value(tag=name, simple_value=value) for name, value in point.figures.items()]
        self._add(point.pipeline, point.time, point.at, summary=summary(value=values))

    def close(self, done: bool) -> None:
        for writer in self._writers.values():
            writer.close()

    def _add(self, pipeline: str, now: float, step: int, **what: Any) -> None:
        if pipeline not in self._writers:
            self._writers[pipeline] = self._open(str(self._directory / pipeline))
        self._writers[pipeline].add_event(self._events.Event(wall_time=now, step=step, **what))
        self._writers[pipeline].flush()  # a run that is killed keeps its curves


class WandbTracker:
    """One W&B run, resumed by its id. Its own step only counts calls: every curve has its pipeline's for its axis."""

    overwrites = False

    def __init__(self, memory: Memory, run_dir: Path, name: str, config: Mapping[str, Any], project: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        memory.id = memory.id or uuid.uuid4().hex[:16]
        self._run: Any = wandb.init(
            project=project,
            name=name,
            id=memory.id,
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
            settings=wandb.Settings(console="off"),
        )
        self._axes: set[str] = set()

    def rewind(self, pipeline: str, step: int) -> None:
        pass

    def log(self, point: Point) -> None:
        axis = f"{point.pipeline}/{point.axis}"
        if axis not in self._axes:
            self._axes.add(axis)
            self._run.define_metric(axis)
            self._run.define_metric(f"{point.pipeline}/*", step_metric=axis)
        self._run.log({**point.figures, axis: point.at})

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class MlflowTracker:
    """One MLflow run on a tracking server or in a local store, found again by its id."""

    overwrites = False

    def __init__(self, memory: Memory, name: str, uri: str, experiment: str) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        self._client: Any = MlflowClient(tracking_uri=uri)
        self._metric: Any = Metric
        if memory.id:
            self._client.update_run(memory.id, status="RUNNING")
        else:
            there = self._client.get_experiment_by_name(experiment)
            where = there.experiment_id if there else self._client.create_experiment(experiment)
            memory.id = self._client.create_run(where, run_name=name).info.run_id
        self._id = memory.id

    def rewind(self, pipeline: str, step: int) -> None:
        pass

    def log(self, point: Point) -> None:
        now = int(point.time * 1000)
        metrics = [self._metric(name, value, now, point.at) for name, value in point.figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, done: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if done else "KILLED")
