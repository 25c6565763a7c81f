"""A real learner that answers for π0: while it waits, while it trains, after it died, with an error once it failed."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors.channel import Box, Channel
from actors.desk import Desk
from actors.learning.frozen import FrozenSpec
from actors.learning.learner import Trainer
from actors.learning.worker import LearnerSpec
from actors.reference import Reference, ReferenceSpec
from actors.weights import PolicyStore
from plumbline.errors import LossError, RunError
from plumbline.models.logp_cache import model_fingerprint
from plumbline.records import PolicyRef, Sample, TokenGroup
from tests.ray.test_learner import CASES, STEPS, Case, assert_same, part, plain, spec_of
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
PATIENCE_S = 600
LORA = Case("lora", {"batch_size": 4})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def expected(model: Path) -> Callable[[Sequence[TokenGroup]], list[list[float]]]:
    """What a copy of π0 says."""
    spec = ReferenceSpec(model_path=str(model), dtype="float32", device="cpu", threads=1, batch_tokens=4096, cache=None)
    return Reference(spec).logps


@dataclass
class Learning:
    """A learner under way, and those who speak with it."""

    channel: Any
    desk: Any
    store: Any
    training: Any

    def put(self, step: int, samples: list[Sample]) -> None:
        ray.get(self.channel.put.remote(step, Box(ref=ray.put(samples))))

    def ask(self, number: int) -> Any:
        return self.desk.logps.remote(question(number))

    def published(self, version: int) -> Any:
        return self.store.wait.remote(PolicyRef(policy="self_contrast", version=version))


def question(number: int) -> list[TokenGroup]:
    """One that was not asked before."""
    return [TokenGroup([40, 41 + number % 200, 41 + number // 200], [[50, 51, 52], [53]])]


def with_base(spec: LearnerSpec, model: Path, cache: Path) -> LearnerSpec:
    fingerprint = model_fingerprint(str(model))
    return replace(
        spec,
        frozen=FrozenSpec(model_path=str(model), fingerprint=fingerprint, dtype="float32", cache=str(cache)),
    )


Learn = Callable[[LearnerSpec], Learning]


@pytest.fixture
def learn() -> Iterator[Learn]:
    """Starts a learner; nothing of it is left for the next test."""
    handles: list[Any] = []

    def start(spec: LearnerSpec) -> Learning:
        channel: Any = ray.remote(Channel).options(num_cpus=0, max_concurrency=100).remote(STEPS)
        store: Any = ray.remote(PolicyStore).options(num_cpus=0, max_concurrency=100).remote(2 * STEPS)
        desk: Any = ray.remote(Desk).options(num_cpus=0, max_concurrency=1000).remote("self_contrast")
        trainer: Any = ray.remote(Trainer).options(num_cpus=0, max_concurrency=10).remote("test")
        handles.extend([trainer, channel, store, desk])
        return Learning(channel, desk, store, trainer.run.remote(spec, channel, store, desk))

    yield start
    for handle in handles:
        ray.kill(handle)
    deadline = time.monotonic() + PATIENCE_S
    while workers() and time.monotonic() < deadline:
        time.sleep(0.2)


def workers() -> list[psutil.Process]:
    """The processes that learn."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            if "RayTrainWorker" in process.cmdline()[0]:
                found.append(process)
    return found


def close(found: list[list[float]], wanted: list[list[float]]) -> bool:
    return found[0] == pytest.approx(wanted[0], rel=1e-6, abs=1e-6)


def long_part(step: int) -> list[Sample]:
    """Seconds of training, in many updates."""
    return [replace(sample, step=step) for i in range(300) for sample in part(i)]


def test_it_answers_while_it_waits_and_while_it_trains_and_says_what_it_failed_with(
    tmp_path: Path, model: Path, learn: Learn, expected: Any
) -> None:
    spec = with_base(spec_of(tmp_path / "run", model, LORA, max_skipped=0), model, tmp_path / "cache")
    learning = learn(replace(spec, total=3))
    assert close(ray.get(learning.ask(0), timeout=PATIENCE_S), expected(question(0))), "before there is any part"
    learning.put(1, long_part(1))
    learning.put(2, part(2))
    published, answered = learning.published(1), []
    while not ray.wait([published], timeout=0)[0]:
        answer = ray.get(learning.ask(1 + len(answered)), timeout=PATIENCE_S)
        if not ray.wait([published], timeout=0)[0]:
            answered.append(answer)
    assert len(answered) > 10, "one may have been answered before the part was leased, the others between micro-batches"
    assert all(close(answer, expected(question(1 + i))) for i, answer in enumerate(answered)), "whatever it has learnt"
    ray.get(learning.published(2), timeout=PATIENCE_S)
    assert close(ray.get(learning.ask(20_000), timeout=PATIENCE_S), expected(question(20_000))), "after the last part"
    counts: Any = ray.get(learning.desk.counts.remote())
    assert counts["hits"] == 0 and counts["misses"] >= 2 * (len(answered) + 2)
    learning.put(3, [*part(3), replace(part(3)[0], ref_logps=(math.nan,) * len(part(3)[0].ref_logps))])
    deadline = time.monotonic() + PATIENCE_S
    with pytest.raises(LossError, match="the loss became nan in step 3"):
        while time.monotonic() < deadline:
            ray.get(learning.ask(0), timeout=PATIENCE_S)
    ray.get(learning.training, timeout=PATIENCE_S)


def test_what_a_killed_worker_held_its_successor_answers(
    tmp_path: Path, model: Path, learn: Learn, expected: Any
) -> None:
    spec = with_base(spec_of(tmp_path / "run", model, LORA, checkpoint_every=1), model, tmp_path / "cache")
    learning = learn(replace(spec, total=1))
    learning.put(1, long_part(1))
    ray.get(learning.ask(0), timeout=PATIENCE_S)
    asked = [learning.ask(i) for i in range(1, 150)]
    ready, _ = ray.wait(asked, num_returns=5, timeout=PATIENCE_S)
    [worker] = workers()
    worker.kill()
    assert len(ready) == 5 and len(ray.wait(asked, num_returns=len(asked), timeout=0)[0]) < 100, "it died over them"
    answers = ray.get(asked, timeout=PATIENCE_S)
    assert all(close(answer, expected(question(i))) for i, answer in enumerate(answers, start=1))
    ray.get(learning.channel.close.remote())
    ray.get(learning.published(1), timeout=PATIENCE_S)
    ray.get(learning.training, timeout=PATIENCE_S)
    with pytest.raises(RunError, match="the learner of self_contrast has ended"):
        ray.get(learning.ask(0), timeout=PATIENCE_S)


def test_two_workers_of_zero_2_answer_and_learn_what_a_silent_one_does(
    tmp_path: Path, model: Path, learn: Learn, expected: Any
) -> None:
    case = CASES[2]
    silent = plain(tmp_path / "silent", model, case)
    spec = spec_of(tmp_path / "asked", model, case, workers=2, strategy="deepspeed", zero=2)
    learning = learn(with_base(spec, model, tmp_path / "cache"))
    early = learning.ask(0)
    assert close(ray.get(early, timeout=PATIENCE_S), expected(question(0)))
    asked = [learning.ask(i) for i in range(1, 60)]
    for step in range(1, STEPS + 1):
        learning.put(step, part(step))
    answers = ray.get(asked, timeout=PATIENCE_S)
    assert all(close(answer, expected(question(i))) for i, answer in enumerate(answers, start=1))
    ray.get(learning.channel.close.remote())
    published = ray.get([learning.published(step) for step in range(1, STEPS + 1)], timeout=PATIENCE_S)
    ray.get(learning.training, timeout=PATIENCE_S)
    assert_same(silent, published, tmp_path / "silent", tmp_path / "asked")
