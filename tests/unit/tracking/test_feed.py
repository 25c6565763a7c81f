"""Experiment trackers: TensorBoard's own reader on real event files; W&B and MLflow as small stand-ins for theirs."""

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.context import EventLog
from plumbline.config.file import parse_config
from plumbline.config.tracking import Tracking
from plumbline.config.tree import Config
from plumbline.errors import ConfigError
from plumbline.tracking import feed as tracking
from plumbline.tracking.feed import check_tracking, numbers, start_trackers

MLFLOW = {"uri": "http://127.0.0.1:5000", "experiment": "manners"}


def config_of(**settings: Any) -> Config:
    tree = {
        "name": "tiny",
        "model": {"path": "base"},
        "data": {"train": {"path": "prompts.jsonl"}},
        "reward": {"type": "program", "function": "module:score"},
        "pipelines": [{"type": "ple"}],
        "tracking": settings,
    }
    return parse_config(tree, origin="test")


class Run:
    """A run directory whose events go where `settings` say; each `with` is a process of its own."""

    def __init__(self, run_dir: Path, **settings: Any) -> None:
        self.run_dir, self.config = run_dir, config_of(**settings)
        self.messages: list[str] = []

    def session(self, feed: Callable[[EventLog], None]) -> None:
        with start_trackers(self.config, self.run_dir, self._listen) as trackers:
            feed(EventLog(self.run_dir / "events.jsonl", self._listen, trackers))

    def _listen(self, event: Mapping[str, Any]) -> None:
        if "message" in event:
            self.messages.append(event["message"])


def steps(first: int, last: int, loss: float = 0.0, pipeline: str = "ple") -> Callable[[EventLog], None]:
    """A pipeline that goes on before step `first`, and does steps up to `last`."""

    def feed(events: EventLog) -> None:
        events.keep(pipeline, first - 1)
        for step in range(first, last + 1):
            events.write({"pipeline": pipeline, "step": step, "steps": 9, "loss": loss + step})

    return feed


def curve(run_dir: Path, pipeline: str, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard draws."""
    read = EventAccumulator(str(run_dir / "tensorboard" / pipeline))
    read.Reload()
    return [(point.step, point.value) for point in read.Scalars(tag)]


# ---- figures -----------------------------------------------------------------------------------------------------


def test_the_figures_of_an_event_are_its_finite_numbers() -> None:
    event = {
        "pipeline": "pool",
        "time": 1.0,
        "step": 3,
        "steps": 9,
        "loss": 0.5,
        "drift": None,
        "gap": float("nan"),
        "error": "no",
        "promoted": True,
        "shares": {"ple": 0.25, "dlma": 0.75},
    }
    assert dict(numbers(event, "pool")) == {"pool/loss": 0.5, "pool/shares/ple": 0.25, "pool/shares/dlma": 0.75}


# ---- TensorBoard -------------------------------------------------------------------------------------------------


def test_tensorboard_draws_every_figure_against_its_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.session(steps(1, 3))
    assert curve(tmp_path, "ple", "ple/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert run.messages == []


def test_steps_done_again_after_a_crash_replace_those_that_were_drawn(tmp_path: Path) -> None:
    """Of two pipelines, one loses its steps from 3 on; the other's of the same numbers stay."""
    run = Run(tmp_path)

    def both(events: EventLog) -> None:
        steps(1, 5)(events)
        steps(1, 5, pipeline="dlma")(events)

    run.session(both)
    run.session(steps(3, 4, loss=100))
    assert curve(tmp_path, "ple", "ple/loss") == [(1, 1.0), (2, 2.0), (3, 103.0), (4, 104.0)]
    assert [step for step, _ in curve(tmp_path, "dlma", "dlma/loss")] == [1, 2, 3, 4, 5]


def test_events_without_a_step_are_drawn_against_the_seconds_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    run = Run(tmp_path)
    drawn = threading.Event()

    def pool(events: EventLog) -> None:
        nonlocal now
        memory = tmp_path / ".tracking" / "tensorboard.json"
        while not memory.exists():  # the clock of the run starts with its tracker
            drawn.wait(0.01)
        now += 7.5
        events.write({"pipeline": "pool", "queue": 2})

    run.session(pool)
    now += 100  # between two processes
    run.session(pool)
    assert curve(tmp_path, "pool", "pool/queue") == [(7, 2.0), (115, 2.0)]


def test_what_belongs_to_no_step_of_a_pipeline_stands_at_its_newest(tmp_path: Path) -> None:
    def feed(events: EventLog) -> None:
        steps(1, 4)(events)
        events.write({"pipeline": "ple", "heldout_accuracy": 0.75})

    Run(tmp_path).session(feed)
    assert curve(tmp_path, "ple", "ple/heldout_accuracy") == [(4, 0.75)]


def test_a_run_that_goes_on_elsewhere_has_its_curves_from_the_start(tmp_path: Path) -> None:
    """Its storage keeps the events, not the curves."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    Run(first).session(steps(1, 5))
    (second / "events.jsonl").write_bytes((first / "events.jsonl").read_bytes())
    Run(second).session(steps(4, 6))
    assert [step for step, _ in curve(second, "ple", "ple/loss")] == [1, 2, 3, 4, 5, 6]


def test_without_tensorboard_nothing_is_written(tmp_path: Path) -> None:
    Run(tmp_path, tensorboard=False).session(steps(1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]


# ---- a tracker that fails ----------------------------------------------------------------------------------------


def test_a_tracker_that_fails_is_off_after_one_warning_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    run = Run(tmp_path)
    run.session(steps(1, 5))
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 5
    [message] = run.messages
    assert message.startswith("tracking: tensorboard is off: ") and "\n" not in message


def test_a_tracker_that_hangs_holds_up_neither_the_run_nor_its_end_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = threading.Event()
    monkeypatch.setattr(tracking.TensorBoard, "log", lambda self, point: hanging.wait(60))
    monkeypatch.setattr(tracking, "CLOSING_S", 0.2)
    run = Run(tmp_path)
    run.session(steps(1, 2))
    assert run.messages == [
        "tracking: tensorboard is off: it did not take its last events in time; the run goes on, events.jsonl has all"
    ]
    monkeypatch.setattr(tracking, "WAITING", 3)
    run.session(steps(3, 50))
    assert len(run.messages) == 2 and "3 events wait for it" in run.messages[1]
    hanging.set()


# ---- W&B and MLflow ----------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """W&B as far as a run uses it; `runs` are by id, as on its server."""
    fake: Any = ModuleType("wandb")
    fake.__spec__ = ModuleSpec("wandb", None, origin="wandb/__init__.py")
    fake.runs = {}

    class OneRun:
        def __init__(self, **settings: Any) -> None:
            self.settings, self.rows, self.axes, self.ended = settings, [], {}, []
            self.log = self.rows.append

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            self.axes[name] = step_metric

        def finish(self, exit_code: int) -> None:
            self.ended.append(exit_code)

    def init(**settings: Any) -> OneRun:
        assert settings["resume"] == "allow"
        return fake.runs.setdefault(settings["id"], OneRun(**settings))

    fake.init, fake.Settings = init, SimpleNamespace
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_every_step_once_in_one_run_however_often_it_is_resumed(tmp_path: Path, wandb: Any) -> None:
    run = Run(tmp_path, tensorboard=False, wandb={"project": "manners"})
    run.session(steps(1, 5))
    run.session(steps(3, 4))  # and killed before it was where it had been
    run.session(steps(4, 7, loss=100))
    [one] = wandb.runs.values()
    assert [(row["ple/step"], row["ple/loss"]) for row in one.rows] == [
        *((step, float(step)) for step in range(1, 6)),
        (6, 106.0),
        (7, 107.0),
    ]
    assert one.axes == {"ple/step": None, "ple/*": "ple/step"}
    assert one.settings["project"] == "manners" and one.settings["config"]["name"] == "tiny"
    assert one.ended == [0, 0, 0] and run.messages == []


def test_parts_that_end_out_of_order_are_all_passed_on(tmp_path: Path, wandb: Any) -> None:
    """A pipeline that only makes parts makes several at once; after a crash it makes those that are left."""
    run = Run(tmp_path, tensorboard=False, wandb={"project": "manners"})

    def first(events: EventLog) -> None:
        events.keep("dlma", 0)
        for step in (3, 1):
            events.write({"pipeline": "dlma", "step": step, "rejected": 0})

    def second(events: EventLog) -> None:
        events.keep("dlma", 3)
        for step in (4, 2):
            events.write({"pipeline": "dlma", "step": step, "rejected": 0})

    run.session(first)
    run.session(second)
    [one] = wandb.runs.values()
    assert [row["dlma/step"] for row in one.rows] == [3, 1, 4, 2]


def test_a_run_that_fails_is_a_failed_one_at_wandb(tmp_path: Path, wandb: Any) -> None:
    def fail(events: EventLog) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        Run(tmp_path, tensorboard=False, wandb={"project": "manners"}).session(fail)
    [one] = wandb.runs.values()
    assert one.ended == [1]


def test_a_server_that_cannot_be_reached_is_warned_of(tmp_path: Path, wandb: Any) -> None:
    def init(**settings: Any) -> None:
        raise ConnectionError("no route to host")

    wandb.init = init
    run = Run(tmp_path, wandb={"project": "manners"})
    run.session(steps(1, 2))
    assert run.messages == [
        "tracking: wandb is off: ConnectionError: no route to host; the run goes on, events.jsonl has all"
    ]
    assert len(curve(tmp_path, "ple", "ple/loss")) == 2  # the other tracker's


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """MLflow as far as a run uses it."""
    fake: Any = ModuleType("mlflow")
    fake.__spec__ = ModuleSpec("mlflow", None, origin="mlflow/__init__.py")
    fake.experiments, fake.runs = {}, {}

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            assert tracking_uri == MLFLOW["uri"]

        def get_experiment_by_name(self, name: str) -> Any:
            return fake.experiments.get(name)

        def create_experiment(self, name: str) -> str:
            fake.experiments[name] = SimpleNamespace(experiment_id=f"e{len(fake.experiments)}")
            return fake.experiments[name].experiment_id

        def create_run(self, experiment_id: str, run_name: str) -> Any:
            run_id = f"r{len(fake.runs)}"
            fake.runs[run_id] = SimpleNamespace(name=run_name, of=experiment_id, status=["RUNNING"], metrics=[])
            return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

        def update_run(self, run_id: str, status: str) -> None:
            fake.runs[run_id].status.append(status)

        def log_batch(self, run_id: str, metrics: list[Any]) -> None:
            fake.runs[run_id].metrics += metrics

        def set_terminated(self, run_id: str, status: str) -> None:
            fake.runs[run_id].status.append(status)

    entities: Any = ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    fake.MlflowClient = Client
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    yield fake


def test_mlflow_gets_every_step_once_in_one_run_however_often_it_is_resumed(tmp_path: Path, mlflow: Any) -> None:
    run = Run(tmp_path, tensorboard=False, mlflow=MLFLOW)
    run.session(steps(1, 3))
    run.session(steps(2, 4))
    [one] = mlflow.runs.values()
    assert one.metrics == [("ple/loss", float(step), step) for step in (1, 2, 3, 4)]
    assert (one.name, one.of, list(mlflow.experiments)) == ("tiny", "e0", ["manners"])
    assert one.status == ["RUNNING", "FINISHED", "RUNNING", "FINISHED"]
    other = tmp_path / "other"
    other.mkdir()
    Run(other, tensorboard=False, mlflow=MLFLOW).session(steps(1, 1))
    assert [one.of for one in mlflow.runs.values()] == ["e0", "e0"]


# ---- what a config may say ---------------------------------------------------------------------------------------


def test_a_tracker_that_is_asked_for_and_not_installed_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tracking\.mlflow: mlflow is not installed; `pip install mlflow`"):
        check_tracking(config_of(mlflow=MLFLOW).tracking)


def test_a_directory_that_wandb_left_is_no_installed_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B writes to ./wandb, which Python takes for a package without files of its own."""
    if tracking._installed("wandb"):
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_tracking(config_of(wandb={"project": "manners"}).tracking)


def test_what_is_installed_is_told(wandb: Any) -> None:
    assert check_tracking(config_of(wandb={"project": "manners"}).tracking) == "tensorboard, wandb"
    assert check_tracking(Tracking(tensorboard=False)) == "none but events.jsonl"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"wandb": {"project": "a/b"}}, "tracking.wandb.project"),
        ({"wandb": {}}, "tracking.wandb.project: missing"),
        ({"wandb": {"projet": "a"}}, "did you mean project"),
        ({"mlflow": {"uri": "http://me:hunter2@host"}}, "MLFLOW_TRACKING_PASSWORD"),
        ({"tensorbord": True}, "did you mean tensorboard"),
    ],
)
def test_a_wrong_section_is_one_clear_line(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**settings)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert "hunter2" not in json.dumps(str(caught.value))
