"""Ray Train with DeepSpeed: ZeRO 1, 2 and 3 on two workers learn what one plain worker does, and resume each other."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from actors.channel import Box, Channel
from actors.learning.learner import fit
from actors.learning.strategy import portion_of
from actors.learning.worker import LearnerSpec, train
from actors.weights import PolicyStore
from plumbline.config.data import Model
from plumbline.config.pipelines import SelfContrast
from plumbline.records import PolicyRef, Publication, Sample, TokenGroup
from plumbline.runs.checkpoint import latest_step
from plumbline.runs.policies import version_directory
from tests.feed import MemoryFeed
from tests.tiny import make_tiny_model

STEPS, SAVED = 20, 10
PROBE = (TokenGroup([40, 41, 42], [[50, 51, 52]]), TokenGroup([43, 44], [[53, 54]]))
PLAIN: dict[str, Any] = {"lr": 1e-3, "batch_size": 4, "micro_tokens": 40, "checkpoint_every": SAVED}
COSINE: dict[str, Any] = {"schedule": "cosine", "warmup": 6, "optimizer": "rmsprop", "clip_norm": 0.5}


@dataclass(frozen=True)
class Case:
    """A learner: `extra` is what its config says beside `PLAIN`."""

    policy: str
    extra: dict[str, Any]


# One for each stage of ZeRO, so that each also meets other weights, another optimiser, another schedule.
CASES = {
    1: Case("lora", {"weight_decay": 0.1}),
    2: Case("lora", COSINE),
    3: Case("full", {"gradient_checkpointing": True}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def part(step: int) -> list[Sample]:
    """Five prompts with one to three negatives each: two updates, of two and three, over unlike numbers of tokens."""
    draw = Random(step)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(30, 300) for _ in range(draw.randint(low, high))]

    samples = []
    for i in range(5):
        responses = [ids(2, 9) for _ in range(2 + (step + i) % 3)]
        logps = tuple(-6.0 * len(r) for r in responses)
        samples.append(Sample(group=TokenGroup(ids(2, 12), responses), ref_logps=logps, step=step))
    return samples


def spec_of(run_dir: Path, model: Path, case: Case, **learner: Any) -> LearnerSpec:
    settings = {**PLAIN, "cpus": 1, "gpus": 0, **case.extra, **learner}
    return LearnerSpec(
        section=SelfContrast.model_validate(
            {"type": "self_contrast", "policy": {"type": case.policy}, "learner": settings}
        ),
        model=Model.model_validate({"path": str(model)}),
        dtype="float32",
        device="cpu",
        probe=PROBE,
        total=STEPS,
        seed=3,
        run_dir=run_dir,
        publishes="adapter" if case.policy == "lora" else "final",
    )


def plain(run_dir: Path, model: Path, case: Case) -> list[Publication]:
    """Train with one plain worker in this process, on the parts that are not in the newest checkpoint yet."""
    feed = MemoryFeed({step: part(step) for step in range(1, STEPS + 1)})
    train(spec_of(run_dir, model, case), feed, rank=0, world=1)
    assert feed.failures == []
    return [p for p in feed.published if p.ref.version > feed.attached[0]]


def cut(run_dir: Path, model: Path, case: Case, zero: int) -> list[Publication]:
    """The same with two workers of Ray Train and DeepSpeed, which compute larger groups in pieces."""
    spec = spec_of(run_dir, model, case, workers=2, strategy="deepspeed", zero=zero, micro_tokens=18)
    assert len({portion_of(part(1), 2, rank, 18).drafts for rank in (0, 1)} - {0}) == 1, "groups are cut into pieces"
    steps = range(latest_step(spec.checkpoints) + 1, STEPS + 1)
    channel: Any = ray.remote(Channel).options(num_cpus=0, max_concurrency=100).remote(STEPS, "", steps[0] - 1)
    store: Any = ray.remote(PolicyStore).options(num_cpus=0, max_concurrency=100).remote(2 * STEPS)
    for step in steps:
        ray.get(channel.put.remote(step, Box(ref=ray.put(part(step)))))
    ray.get(channel.close.remote())
    fit(spec, channel, store)
    published = ray.get([store.wait.remote(PolicyRef(policy="self_contrast", version=s)) for s in steps], timeout=60)
    for handle in (channel, store):
        ray.kill(handle)
    return published


def assert_same(one: list[Publication], two: list[Publication], run_dir: Path, other: Path) -> None:
    """Losses, gradients, probes and the last weights are those of plain updates."""
    for key, tolerance in (("loss", 1e-3), ("grad_norm", 1e-2)):  # Adam's updates would hide a scaled gradient
        assert [p.metrics[key] for p in two] == pytest.approx([p.metrics[key] for p in one], abs=tolerance)
    for expected, found in zip(one, two, strict=True):
        assert found.probe_logps == pytest.approx(expected.probe_logps, abs=1e-3)
        assert found.base_probe_logps == pytest.approx(expected.base_probe_logps, abs=1e-5)
    expected, found = weights(run_dir), weights(other)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < 5e-4, name


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    directory = version_directory(run_dir, PolicyRef(policy="self_contrast", version=STEPS))
    return load_file(next(directory.glob("*model.safetensors")))


def stopped_at(run_dir: Path, step: int, copy: Path) -> Path:
    """A copy of a run as it was when `step` had been saved."""
    shutil.copytree(run_dir / "checkpoints", copy / "checkpoints")
    for directory in (copy / "checkpoints" / "self_contrast").iterdir():
        if directory.name != f"step-{step:06d}":
            shutil.rmtree(directory)
    return copy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[int, tuple[Path, list[Publication]]]:
    """One plain worker, for each case."""
    found = {}
    for zero, case in CASES.items():
        run_dir = tmp_path_factory.mktemp(f"plain-{zero}")
        found[zero] = (run_dir, plain(run_dir, model, case))
        losses = [p.metrics["loss"] for p in found[zero][1]]
        assert len(losses) == STEPS
        assert max(losses) - min(losses) > 0.1, "nothing was learnt: equal losses would show nothing"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_workers_learn_what_one_does_and_one_goes_on_from_them(
    zero: int, runs: dict[int, tuple[Path, list[Publication]]], model: Path, tmp_path: Path
) -> None:
    run_dir, expected = runs[zero]
    other = tmp_path / "cut"
    assert_same(expected, cut(other, model, CASES[zero], zero), run_dir, other)

    resumed = stopped_at(other, SAVED, tmp_path / "resumed")
    assert_same(expected[SAVED:], plain(resumed, model, CASES[zero]), run_dir, resumed)


@pytest.mark.parametrize("zero", [2, 3])
def test_two_workers_go_on_from_one(
    zero: int, runs: dict[int, tuple[Path, list[Publication]]], model: Path, tmp_path: Path
) -> None:
    run_dir, expected = runs[zero]
    resumed = stopped_at(run_dir, SAVED, tmp_path / "resumed")
    assert_same(expected[SAVED:], cut(resumed, model, CASES[zero], zero), run_dir, resumed)
