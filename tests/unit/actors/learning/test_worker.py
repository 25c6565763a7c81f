"""What a learner's worker does, on a feed in memory: train, save, publish, and go on where it stopped."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file

from actors.learning import resuming, worker
from actors.learning.sharing import shares_weights
from actors.learning.worker import LearnerSpec, Worker, train
from plumbline.config.data import Model
from plumbline.config.learner import Learner
from plumbline.config.pipelines import Ple, RewardModel, Sft
from plumbline.errors import LossError, LostError, RunError
from plumbline.models.digest import digest
from plumbline.models.ipc import open_shared
from plumbline.records import Completion, Message, PolicyRef, Prompt, Sample, TokenGroup
from plumbline.runs.checkpoint import latest_step
from plumbline.runs.parts import Parts
from plumbline.runs.policies import read_publication, version_directory, versions
from plumbline.runs.rollouts import PLE_SCHEMA, ple_row, ple_sample
from plumbline.runs.storage import Storage
from tests.feed import Killed, MemoryFeed

STEPS, ROWS = 4, 6
PROBE = (TokenGroup([40, 41, 42], [[50, 51, 52]]), TokenGroup([43, 44], [[53, 54], [55]]))
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def row(step: int, number: int) -> dict[str, object]:
    """A row of random tokens; some pairs are ranked, some are weighted."""
    draw = torch.Generator().manual_seed(100 * step + number)

    def ids(count: int) -> list[int]:
        return torch.randint(30, 600, (count,), generator=draw).tolist()

    prompt = Prompt(id=f"{step}-{number}", messages=(Message(role="user", content="Why?"),))
    return ple_row(
        step=step,
        prompt=prompt,
        prompt_ids=ids(4 + number),
        plain=Completion(text="a", ids=ids(3 + number % 3), finish_reason="stop"),
        guided=Completion(text="b", ids=ids(5), finish_reason="length"),
        rewards=(0.5, 0.5 + 0.1 * (number - 2)),
        version=step - 1,
        staleness=0,
        engine="generator-0",
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return new_run(tmp_path / "run")


def new_run(directory: Path) -> Path:
    """A run directory whose parts are all committed."""
    parts = Parts(str(directory / "rollouts" / "ple"), PLE_SCHEMA)
    for step in range(1, STEPS + 1):
        parts.write(step, [row(step, number) for number in range(ROWS)])
    return directory


def parts_of(run_dir: Path, steps: int = STEPS) -> dict[int, list[Sample]]:
    parts = Parts(str(run_dir / "rollouts" / "ple"), read_only=True)
    return {step: [ple_sample(row) for row in parts.read(step)] for step in range(1, steps + 1)}


def spec(run_dir: Path, model: Path, section: Ple | Sft | RewardModel | None = None, **learner: Any) -> LearnerSpec:
    settings = {"lr": 1e-2, "batch_size": 4, **learner}
    given = section or Ple.model_validate({"type": "ple", "replay_window": 2, "learner": settings})
    placed = given.learner.model_copy(update={"cpus": 1, "gpus": 0.0})
    return LearnerSpec(
        section=given.model_copy(update={"learner": placed}),
        model=Model.model_validate({"path": str(model)}),
        dtype="float32",
        device="cpu",
        probe=PROBE if section is None else (),
        total=STEPS,
        seed=3,
        run_dir=run_dir,
        publishes="adapter" if section is None else "final",
    )


def weights(run_dir: Path, version: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(version_directory(run_dir, PolicyRef(policy="ple", version=version)) / "adapter_model.safetensors")


def assert_same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert set(one) == set(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=tolerance, atol=tolerance)


# A run


def test_every_part_makes_a_version_with_what_proves_it(run_dir: Path, tiny_model: Path) -> None:
    feed = MemoryFeed(parts_of(run_dir))
    train(spec(run_dir, tiny_model), feed, rank=0, world=1)
    assert feed.failures == []
    assert feed.attached == [0]
    assert feed.acked == [1, 2, 3, 4]
    assert [p.ref for p in feed.published] == [PolicyRef(policy="ple", version=v) for v in (1, 2, 3, 4)]
    assert versions(run_dir, "ple") == [1, 2, 3, 4]
    assert latest_step(run_dir / "checkpoints" / "ple") == 4
    before = feed.published[0].base_probe_logps
    assert len(before) == 3, "one a probe response"
    for published in feed.published:
        assert set(published.files) == ADAPTER
        assert published.base_probe_logps == feed.published[0].base_probe_logps
        assert published.previous_probe_logps == before
        assert max(abs(a - b) for a, b in zip(published.probe_logps, before, strict=True)) > 1e-4, "it learnt"
        before = published.probe_logps
        on_disk = read_publication(run_dir, published.ref)
        assert on_disk.files == published.files
        assert on_disk.probe_logps == published.probe_logps


def test_every_version_of_a_full_policy_is_a_whole_model(run_dir: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from plumbline.models.group_logps import group_logps

    learner = {"lr": 1e-3, "batch_size": 4}
    section = Ple.model_validate({"type": "ple", "policy": {"type": "full"}, "replay_window": 2, "learner": learner})
    feed = MemoryFeed(parts_of(run_dir))
    train(replace(spec(run_dir, tiny_model, section), probe=PROBE, publishes="full"), feed, rank=0, world=1)
    assert feed.failures == []
    assert feed.acked == [1, 2, 3, 4], "each is saved before it is served"
    assert versions(run_dir, "ple") == [1, 2, 3, 4]
    for published in feed.published:
        assert not published.files and published.directory == str(version_directory(run_dir, published.ref))
        files = {file.name for file in version_directory(run_dir, published.ref).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
        model = AutoModelForCausalLM.from_pretrained(version_directory(run_dir, published.ref), dtype=torch.float32)
        with torch.no_grad():
            logps, tokens = group_logps(model, PROBE)
        assert (logps / tokens)[tokens > 0].tolist() == pytest.approx(list(published.probe_logps), abs=1e-5)


def test_the_events_figures(run_dir: Path, tiny_model: Path) -> None:
    feed = MemoryFeed(parts_of(run_dir))
    train(spec(run_dir, tiny_model), feed, rank=0, world=1)
    first, second, third, _ = (published.metrics for published in feed.published)
    assert (first["updates"], second["updates"], third["updates"]) == (2, 3, 3)  # of 6, 12 and 12 prompts, 4 at most
    assert (first["replayed"], second["replayed"], third["replayed"]) == (6, 12, 12)
    assert (first["tau"], second["tau"]) == pytest.approx((0.2, 0.18))
    # Gaps are -0.2, -0.1, 0, 0.1, 0.2, 0.3: above 0.2 is one of six, above 0.18 two.
    assert (first["rank_share"], second["rank_share"]) == pytest.approx((1 / 6, 1 / 3), abs=1e-6)
    assert first["gap"] == pytest.approx(0.05, abs=1e-6)
    for metrics in (first, second, third):
        assert metrics["loss"] == pytest.approx(metrics["rank_loss"] + metrics["sft_loss"], rel=1e-4)
        assert metrics["grad_norm"] > 0
        assert metrics["learner_work_s"] > 0
        assert metrics["learner_wait_s"] >= 0
        assert metrics["learner_tokens_per_s"] > 0
        assert "mfu" not in metrics and not [key for key in metrics if "gpu" in key], "there is no card here"


def test_a_version_is_an_adapter_that_peft_loads_as_it_is(run_dir: Path, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from plumbline.models.group_logps import group_logps

    feed = MemoryFeed(parts_of(run_dir))
    train(spec(run_dir, tiny_model), feed, rank=0, world=1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(version_directory(run_dir, feed.published[-1].ref)))
    with torch.no_grad():
        logps, tokens = group_logps(model, PROBE)
    means = (logps / tokens)[tokens > 0].tolist()
    assert means == pytest.approx(list(feed.published[-1].probe_logps), abs=1e-5)


@pytest.mark.parametrize("settings", [{"micro_tokens": 1}, {"micro_tokens": 40}, {"gradient_checkpointing": True}])
def test_how_a_batch_is_computed_does_not_change_the_result(
    run_dir: Path, tiny_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    other = new_run(tmp_path / "other")
    train(spec(run_dir, tiny_model), MemoryFeed(parts_of(run_dir, 2)), rank=0, world=1)
    train(spec(other, tiny_model, **settings), MemoryFeed(parts_of(other, 2)), rank=0, world=1)
    assert_same(weights(run_dir, 2), weights(other, 2), tolerance=2e-4)


def test_the_learning_rate_warms_up_and_falls(run_dir: Path, tiny_model: Path) -> None:
    feed = MemoryFeed(parts_of(run_dir))
    train(spec(run_dir, tiny_model, lr=0.01, warmup=4, schedule="cosine"), feed, rank=0, world=1)
    # Updates done: 2, 5, 8, 11. The cosine falls over four parts: 1, (1 + √½) / 2, ½, (1 - √½) / 2.
    rates = [published.metrics["lr"] for published in feed.published]
    assert rates == pytest.approx([0.005, 0.00853553, 0.005, 0.00146447], abs=1e-7)


# Stopping and going on


@pytest.mark.parametrize("settings", [{}, {"optimizer": "rmsprop"}, {"schedule": "cosine", "warmup": 7}])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    run_dir: Path, tiny_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    straight = MemoryFeed(parts_of(run_dir))
    train(spec(run_dir, tiny_model, **settings), straight, rank=0, world=1)
    other = new_run(tmp_path / "other")
    train(spec(other, tiny_model, **settings), MemoryFeed(parts_of(other, 2)), rank=0, world=1)
    again = MemoryFeed(parts_of(other))
    train(spec(other, tiny_model, **settings), again, rank=0, world=1)
    assert again.attached == [2]
    assert again.acked == [3, 4]
    assert [p.ref.version for p in again.published] == [2, 3, 4], "what it stands on is published again"
    assert_same(weights(run_dir), weights(other))
    for one, two in zip(straight.published[1:], again.published, strict=True):
        assert two.probe_logps == one.probe_logps
        assert two.previous_probe_logps == one.previous_probe_logps
        assert two.base_probe_logps == one.base_probe_logps
        assert {k: v for k, v in two.metrics.items() if not k.endswith("_s")} == {
            k: v for k, v in one.metrics.items() if not k.endswith("_s")
        }


def test_a_worker_killed_between_saving_and_publishing_publishes_when_it_is_back(
    run_dir: Path, tiny_model: Path
) -> None:
    dying = MemoryFeed(parts_of(run_dir), dies_at=2)
    with pytest.raises(Killed):
        train(spec(run_dir, tiny_model), dying, rank=0, world=1)
    assert dying.acked == [1], "the part of step 2 is handed out again, and skipped"
    back = MemoryFeed(parts_of(run_dir))
    train(spec(run_dir, tiny_model), back, rank=0, world=1)
    assert back.attached == [2]
    assert [p.ref.version for p in back.published] == [2, 3, 4]


def test_parts_are_acknowledged_only_once_they_are_saved(run_dir: Path, tiny_model: Path) -> None:
    feed = MemoryFeed(parts_of(run_dir))
    train(spec(run_dir, tiny_model, checkpoint_every=3), feed, rank=0, world=1)
    assert feed.acked == [3, 4]
    assert [p.ref.version for p in feed.published] == [1, 2, 3, 4]


@pytest.mark.parametrize("stored", [False, True])
def test_a_version_that_no_checkpoint_holds_means_the_same_weights_after_a_death(
    run_dir: Path, tiny_model: Path, tmp_path: Path, stored: bool
) -> None:
    """Its step is done again, a little otherwise than before, and another version comes of the next one alone."""

    def learner(directory: Path, **settings: Any) -> LearnerSpec:
        every = spec(directory, tiny_model, checkpoint_every=2, **settings)
        return replace(every, storage=str(tmp_path / "store") if stored else None)

    if stored:
        Storage(run_dir, str(tmp_path / "store")).push(*sorted((run_dir / "rollouts" / "ple").iterdir()))
    first = MemoryFeed(parts_of(run_dir, 3))  # it dies before step 4, whose checkpoint would be the next
    train(learner(run_dir), first, rank=0, world=1)
    assert (first.acked, [p.ref.version for p in first.published]) == ([2], [1, 2, 3])
    if stored:  # on another machine
        run_dir = tmp_path / "other"
    again = MemoryFeed(parts_of(new_run(tmp_path / "parts")))
    train(learner(run_dir, lr=1.01e-2), again, rank=0, world=1)  # on some machines other batches alone change nothing
    assert again.attached == [2] and again.acked == [4]
    assert [p.ref.version for p in again.published] == [2, 3, 4]
    for one, two in zip(first.published[1:], again.published, strict=False):
        assert (two.files, two.probe_logps, two.digests) == (one.files, one.probe_logps, one.digests)
        assert read_publication(run_dir, one.ref).files == one.files
        directory = version_directory(run_dir, one.ref)
        there = Storage(run_dir, learner(run_dir).storage)
        assert not stored or there.read_text(directory / "proof.json") == (directory / "proof.json").read_text()
    assert again.published[-1].previous_probe_logps != first.published[-1].probe_logps, "it was done otherwise"
    assert again.published[1].metrics["updates"] == first.published[2].metrics["updates"]


def test_a_version_that_was_here_alone_gives_way_to_the_storages(
    run_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Its learner died before it had pushed it, and another one published another under its number."""
    stored = replace(spec(run_dir, tiny_model, checkpoint_every=4), storage=str(tmp_path / "store"))
    elsewhere = replace(stored, run_dir=new_run(tmp_path / "elsewhere"))
    Storage(run_dir, stored.storage).push(*sorted((run_dir / "rollouts" / "ple").iterdir()))
    train(replace(stored, storage=None), MemoryFeed(parts_of(run_dir, 1)), rank=0, world=1)
    rates = elsewhere.section.learner.model_copy(update={"lr": 1e-3})
    other = MemoryFeed(parts_of(elsewhere.run_dir, 1))
    train(replace(elsewhere, section=elsewhere.section.model_copy(update={"learner": rates})), other, rank=0, world=1)
    feed = MemoryFeed(parts_of(run_dir, 2))
    train(stored, feed, rank=0, world=1)
    assert feed.published[0].files == other.published[0].files
    assert read_publication(run_dir, other.published[0].ref).files == other.published[0].files


def test_a_part_without_rows_makes_a_version_too(run_dir: Path, tiny_model: Path) -> None:
    """All its prompts were rejected: the policy stays, and the run goes on."""
    feed = MemoryFeed({1: [], 2: parts_of(run_dir)[2]})
    train(spec(run_dir, tiny_model), feed, rank=0, world=1)
    assert feed.failures == []
    first, second = feed.published
    assert first.metrics["updates"] == 0
    assert first.probe_logps == first.base_probe_logps
    assert second.probe_logps != first.probe_logps


@pytest.mark.parametrize("late", [False, True])
def test_a_learner_that_does_not_see_what_was_acknowledged(
    run_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """On another machine, or in a directory that shows late what another machine wrote: it waits, then refuses."""
    parts = parts_of(run_dir)
    train(spec(run_dir, tiny_model), MemoryFeed(parts_of(run_dir, 3)), rank=0, world=1)
    hidden = (run_dir / "checkpoints" / "ple" / "step-000003").rename(tmp_path / "hidden")
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if late and len(waited) == 3:
            hidden.rename(run_dir / "checkpoints" / "ple" / "step-000003")

    monkeypatch.setattr(resuming, "SHOWS_S", 0.05 if not late else 60)
    monkeypatch.setattr(resuming.time, "sleep", sleep)
    feed = MemoryFeed(parts)
    feed.acked = [3]
    train(spec(run_dir, tiny_model), feed, rank=0, world=1)
    if late:
        assert (feed.failures, feed.attached, feed.acked) == ([], [3], [3, 4])
        return
    [(_, error)] = feed.failures
    assert type(error) is RunError and feed.attached == [] and waited
    assert str(error) == (
        f"{run_dir}/checkpoints/ple: there is no checkpoint of step 3 to be seen on this machine, though it was saved "
        "(the newest is of step 2); a learner's machines need a run directory that all of them see, or `storage_path`"
    )


# A storage


def test_it_goes_on_from_the_storage_where_its_directory_is_gone(
    tmp_path: Path, run_dir: Path, tiny_model: Path
) -> None:
    parts = parts_of(run_dir)
    train(spec(run_dir, tiny_model), MemoryFeed(parts), rank=0, world=1)
    lost, new, url = new_run(tmp_path / "lost"), tmp_path / "new", str(tmp_path / "store")
    Storage(lost, url).push(*sorted((lost / "rollouts" / "ple").iterdir()))
    stored = replace(spec(lost, tiny_model), storage=url)
    train(stored, MemoryFeed({step: parts[step] for step in (1, 2)}), rank=0, world=1)
    shutil.rmtree(lost)

    feed = MemoryFeed(parts)
    train(replace(stored, run_dir=new), feed, rank=0, world=1)
    assert feed.failures == []
    assert feed.attached == [2]
    assert feed.acked == [3, 4]
    assert [p.ref.version for p in feed.published] == [2, 3, 4]
    assert_same(weights(new), weights(run_dir))
    storage = Storage(new, url)
    assert storage.complete(new / "policies" / "ple", "proof.json") == [1, 2, 3, 4]
    assert storage.complete(new / "checkpoints" / "ple", "state.json") == [3, 4]


def test_a_part_is_not_acknowledged_before_its_checkpoint_is_in_the_storage(
    tmp_path: Path, run_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = LocalFileSystem.put_file

    def fails(files: LocalFileSystem, source: str, target: str, **options: Any) -> None:
        if source.endswith("step-000002/state.json"):
            raise OSError(28, "No space left on device")
        upload(files, source, target, **options)

    parts, stored = parts_of(run_dir), replace(spec(run_dir, tiny_model), storage=str(tmp_path / "store"))
    with monkeypatch.context() as full:
        full.setattr(LocalFileSystem, "put_file", fails)
        feed = MemoryFeed(parts)
        train(stored, feed, rank=0, world=1)
    [(_, error)] = feed.failures
    assert type(error) is RunError and "No space left on device" in str(error)
    assert feed.acked == [1]
    assert [p.ref.version for p in feed.published] == [1]
    assert latest_step(stored.checkpoints) == 2, "it is here alone"
    again = MemoryFeed(parts)
    train(stored, again, rank=0, world=1)
    assert again.attached == [1], "what counts is what all machines see"
    assert again.acked == [2, 3, 4]


def test_where_only_a_learner_works_old_versions_leave_the_disk_and_stay_in_the_storage(
    tmp_path: Path, run_dir: Path, tiny_model: Path
) -> None:
    learner = {"lr": 1e-3, "batch_size": 4, "keep_versions": 2}
    section = Ple.model_validate({"type": "ple", "learner": learner})
    for directory, left in ((run_dir, [3, 4]), (new_run(tmp_path / "driver"), [1, 2, 3, 4])):
        if len(left) == 4:
            (directory / "config.yaml").touch()  # the run's own process is here, and says which ones go
        url = str(tmp_path / f"store-{len(left)}")
        stored = replace(spec(directory, tiny_model, section), probe=PROBE, publishes="adapter", storage=url)
        Storage(directory, url).push(*sorted((directory / "rollouts" / "ple").iterdir()))
        train(stored, MemoryFeed(parts_of(directory)), rank=0, world=1)
        assert versions(directory, "ple") == left
        assert Storage(directory, url).complete(directory / "policies" / "ple", "proof.json") == [1, 2, 3, 4]


# Failures


def test_a_nan_loss_stops_it_and_says_what_is_saved(run_dir: Path, tiny_model: Path) -> None:
    parts = parts_of(run_dir)
    broken = parts[3][2]
    parts[3][2] = Sample(group=broken.group, rewards=(math.nan, 0.5), step=3)
    feed = MemoryFeed(parts)
    train(spec(run_dir, tiny_model, max_skipped=0), feed, rank=0, world=1)
    [(policy, error)] = feed.failures
    assert policy == "ple"
    assert type(error) is LossError
    assert str(error) == (
        f"ple: the loss became nan in step 3; the checkpoint of step 2 is saved in {run_dir}/checkpoints/ple; "
        "try a lower lr"
    )
    assert feed.acked == [1, 2]
    assert [p.ref.version for p in feed.published] == [1, 2]
    assert latest_step(run_dir / "checkpoints" / "ple") == 2


def test_another_optimizer_does_not_go_on(run_dir: Path, tiny_model: Path) -> None:
    parts = parts_of(run_dir)
    train(spec(run_dir, tiny_model), MemoryFeed({1: parts[1]}), rank=0, world=1)
    one = spec(run_dir, tiny_model)
    other = one.section.learner.model_copy(update={"optimizer": "rmsprop"})
    feed = MemoryFeed(parts)
    train(replace(one, section=one.section.model_copy(update={"learner": other})), feed, rank=0, world=1)
    [(_, error)] = feed.failures
    assert str(error) == (
        f"{one.checkpoints}: step 1 was saved with `optimizer: adamw`, the config says rmsprop; write the former, or "
        "start another run"
    )
    assert feed.published == []


def test_a_nan_in_the_first_step(run_dir: Path, tiny_model: Path) -> None:
    broken = parts_of(run_dir)[1][0]
    feed = MemoryFeed({1: [Sample(group=broken.group, rewards=(math.nan, 0.5), step=1)]})
    train(spec(run_dir, tiny_model, max_skipped=0), feed, rank=0, world=1)
    assert "no step was saved yet" in str(feed.failures[0][1])


def test_a_gradient_that_is_not_finite(run_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    feed = MemoryFeed(parts_of(run_dir))
    train(spec(run_dir, tiny_model), feed, rank=0, world=1)
    [(_, error)] = feed.failures
    assert type(error) is LossError
    assert "the gradient became inf in 4 optimiser steps in a row, the last in step 2" in str(error)
    assert [p.ref.version for p in feed.published] == [1], "of 2 updates, both left out; step 2 has 3"


def test_an_optimiser_step_that_is_not_finite_is_left_out_and_told(run_dir: Path, tiny_model: Path) -> None:
    """One of a part's two; the part is done, its version has what the other learnt."""
    parts = parts_of(run_dir)
    parts[4][0] = replace(parts[4][0], rewards=(math.nan, 0.5))
    feed = MemoryFeed(parts)
    section = Ple.model_validate({"type": "ple", "replay_window": 1, "learner": {"lr": 1e-2, "batch_size": 4}})
    train(replace(spec(run_dir, tiny_model, section), probe=PROBE, publishes="adapter"), feed, rank=0, world=1)
    assert (feed.failures, feed.acked) == ([], [1, 2, 3, 4])
    third, fourth = feed.published[-2:]
    assert "skipped_updates" not in third.metrics
    assert (fourth.metrics["updates"], fourth.metrics["skipped_updates"]) == (1, 1)
    assert all(map(math.isfinite, fourth.metrics.values()))
    assert fourth.probe_logps != third.probe_logps


def test_a_part_whose_steps_are_all_left_out_changes_nothing(run_dir: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Neither weights nor the optimiser: what follows learns as it would have without the part."""
    parts = parts_of(run_dir)
    without = {**parts, 2: []}
    broken = {**parts, 2: [replace(one, rewards=(math.nan, 0.5)) for one in parts[2]]}
    learner = {"lr": 1e-2, "batch_size": 4, "warmup": 5}
    section = Ple.model_validate({"type": "ple", "replay_window": 1, "learner": learner})
    feeds = []
    for directory, given in ((run_dir, broken), (new_run(tmp_path / "other"), without)):
        feeds.append(MemoryFeed(given))
        one = replace(spec(directory, tiny_model, section), probe=PROBE, publishes="adapter")
        train(one, feeds[-1], rank=0, world=1)
        assert feeds[-1].failures == []
    first, second, *_ = feeds[0].published
    assert (second.metrics["updates"], second.metrics["skipped_updates"]) == (0, 2)
    assert second.files == first.files and second.probe_logps == first.probe_logps
    assert_same(weights(run_dir), weights(tmp_path / "other"))
    assert [p.metrics["lr"] for p in feeds[0].published[2:]] == [p.metrics["lr"] for p in feeds[1].published[2:]]


def test_steps_left_out_in_a_row_count_over_parts_and_over_a_restart(run_dir: Path, tiny_model: Path) -> None:
    parts = {step: [replace(one, rewards=(math.nan, 0.5)) for one in part] for step, part in parts_of(run_dir).items()}
    section = Ple.model_validate({"type": "ple", "replay_window": 1, "learner": {"batch_size": 4, "max_skipped": 4}})
    given = replace(spec(run_dir, tiny_model, section), probe=PROBE, publishes="adapter")
    train(given, MemoryFeed({1: parts[1]}), rank=0, world=1)
    feed = MemoryFeed(parts)
    train(given, feed, rank=0, world=1)
    [(_, error)] = feed.failures
    assert "the loss became nan in 5 optimiser steps in a row, the last in step 3; the checkpoint of step 2" in str(
        error
    )


def test_an_unforeseen_failure_is_told_and_raised(run_dir: Path, tiny_model: Path) -> None:
    """So that Ray Train tries again, and that nobody waits for it meanwhile."""
    feed = MemoryFeed({1: [Sample(group=TokenGroup([5], [[10**9], [7]]), rewards=(0.0, 1.0), step=1)]})
    with pytest.raises(IndexError):
        train(spec(run_dir, tiny_model), feed, rank=0, world=1)
    [(policy, error)] = feed.failures
    assert policy == "ple"
    assert type(error) is RunError
    assert str(error).startswith("the learner of ple failed: IndexError(")


# The other pipelines


def test_a_worker_whose_peer_went_away_leaves_it_to_ray_train(
    run_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = f"file://{run_dir}/meeting"
    code = (
        "import os, sys, torch.distributed as dist; dist.init_process_group('gloo', sys.argv[1], rank=1, world_size=2)"
    )
    peer = subprocess.Popen([sys.executable, "-c", f"{code}; dist.barrier(); os._exit(9)", meeting])
    dist.init_process_group("gloo", meeting, rank=0, world_size=2)
    try:
        dist.barrier()
        peer.wait()
        with pytest.raises(RuntimeError) as caught:
            dist.all_reduce(torch.ones(1))
    finally:
        dist.destroy_process_group()

    def exchange(worker: Worker) -> None:
        raise caught.value

    monkeypatch.setattr(Worker, "run", exchange)
    feed = MemoryFeed(parts_of(run_dir))
    with pytest.raises(RuntimeError):
        train(spec(run_dir, tiny_model), feed, rank=0, world=1)
    assert feed.failures == []


def test_a_worker_that_lost_its_channel_tells_nobody_but_who_started_it(
    run_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(worker: Worker) -> None:
        raise LostError("the process run/channel-ple-0 died")

    monkeypatch.setattr(Worker, "run", lose)
    feed = MemoryFeed(parts_of(run_dir))
    with pytest.raises(LostError):
        train(spec(run_dir, tiny_model), feed, rank=0, world=1)
    assert feed.failures == []  # a store that heard of it would tell the pipeline's next learner's versions so


def test_sft_trains_all_weights_and_publishes_a_model_at_the_end(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    section = Sft.model_validate({"learner": {"lr": 1e-2, "batch_size": 4, "checkpoint_every": 3}})
    parts = {
        step: [Sample(group=TokenGroup([5, 6, 7], [[40, 41, 42, 2]])) for _ in range(4)] for step in range(1, STEPS + 1)
    }
    feed = MemoryFeed(parts)
    train(spec(tmp_path, tiny_model, section), feed, rank=0, world=1)
    assert feed.failures == []
    assert feed.acked == [3, 4]
    assert [p.ref.version for p in feed.published] == [1, 2, 3, 4]
    assert not any(p.files for p in feed.published), "a whole model goes through the directory, not through the store"
    losses = [p.metrics["loss"] for p in feed.published]
    assert losses[-1] < losses[0] - 0.5
    assert versions(tmp_path, "sft") == [4]
    directory = version_directory(tmp_path, PolicyRef(policy="sft", version=4))
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.generation_config.eos_token_id == 2, "<|im_end|>, which targets end with"
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, len(AutoTokenizer.from_pretrained(directory)))
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(directory / "model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_reward_model_is_saved_as_a_classifier_of_one_label(tmp_path: Path, tiny_model: Path) -> None:
    section = RewardModel.model_validate({"type": "reward", "learner": {"lr": 1e-2, "batch_size": 4}})
    texts = [Sample(group=TokenGroup([], [[40 + i, 41]]), rewards=(float(i % 2),)) for i in range(4)]
    feed = MemoryFeed({step: texts for step in range(1, STEPS + 1)})
    train(spec(tmp_path, tiny_model, section), feed, rank=0, world=1)
    assert feed.failures == []
    assert feed.published[-1].metrics["loss"] < feed.published[0].metrics["loss"]
    directory = version_directory(tmp_path, PolicyRef(policy="reward", version=STEPS))
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (directory / "tokenizer.json").is_file()


def test_a_reward_model_needs_no_chat_template(tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("chat_template*"))
    section = RewardModel.model_validate({"type": "reward"})
    text = Sample(group=TokenGroup([], [[40, 41]]), rewards=(1.0,))
    feed = MemoryFeed({step: [text] for step in range(1, STEPS + 1)})
    train(spec(tmp_path, model, section), feed, rank=0, world=1)
    assert feed.failures == []
    assert versions(tmp_path, "reward") == [STEPS]


def whole_spec(run_dir: Path, model: Path, gpus: float = 0.0) -> LearnerSpec:
    section = Ple.model_validate({"type": "ple", "policy": {"type": "full"}, "learner": {"gpus": gpus, "cpus": 1}})
    return replace(spec(run_dir, model, section), publishes="full", probe=PROBE)


def test_whole_weights_are_laid_out_on_a_card_that_is_shared_and_nowhere_else(run_dir: Path, tiny_model: Path) -> None:
    model = torch.nn.Linear(1, 1)
    on_card = replace(whole_spec(run_dir, tiny_model), device="cuda")
    beside, alone = (
        replace(on_card, section=on_card.section.model_copy(update={"learner": Learner(gpus=gpus, cpus=1)}))
        for gpus in (0.3, 1.0)
    )

    def shares(one: LearnerSpec, model: Any, world: int) -> bool:
        return shares_weights(one.section, one.publishes, one.device, model, world)

    assert shares(beside, model, 1)
    assert not shares(beside, model, 2)
    assert not shares(alone, model, 1)
    assert not shares(replace(beside, device="cpu"), model, 1)
    assert not shares(replace(beside, publishes="final"), model, 1)
    adapter = Ple.model_validate({"type": "ple", "learner": {"gpus": 0.3, "cpus": 1}})
    assert not shares(replace(beside, section=adapter), model, 1)


def test_what_is_laid_out_is_what_is_published(
    run_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "shares_weights", lambda *_: True)
    feed = MemoryFeed(parts_of(run_dir))
    train(whole_spec(run_dir, tiny_model), feed, 0, 1)
    last = feed.published[-1]
    assert last.shared is not None
    found = dict(open_shared(last.shared, torch.device("cpu")) or ())
    written = load_file(version_directory(run_dir, last.ref) / "model.safetensors")
    assert {name: digest(weight) for name, weight in found.items()} == last.digests["float32"]
    assert found.keys() <= written.keys() and all(torch.equal(found[name], written[name]) for name in found)
