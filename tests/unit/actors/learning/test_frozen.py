"""π0 inside a learner: what it answers is what a copy of π0 does, and the learner learns what it would have learnt."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.desk import Question
from actors.frozen_logps import ContrastPrompts
from actors.learning.frozen import FrozenSpec, without_adapter
from actors.learning.policy import LearnedPolicy
from actors.learning.worker import LearnerSpec, train
from actors.reference import Reference, ReferenceSpec
from plumbline.config.data import Model
from plumbline.config.pipelines import SelfContrast
from plumbline.errors import RunError
from plumbline.models.group_logps import group_logps
from plumbline.models.logp_cache import model_fingerprint
from plumbline.records import Completion, Generation, PolicyRef, Sample, TokenGroup
from plumbline.runs.policies import version_directory
from tests.feed import MemoryFeed

STEPS = 3
GROUPS = [TokenGroup([5, 6, 7], [[8, 9, 10, 2], [11, 12]]), TokenGroup([20, 21], [[30], []])]


def generation(ids: list[int]) -> Generation:
    completion = Completion(text="", ids=ids, finish_reason="stop")
    return Generation(key="k", ref=PolicyRef(), engine="e", completions=(completion,))


CONTRAST: Any = (
    [ContrastPrompts(plain_ids=[5, 6, 7], positive_ids=[50, 51, 5, 6, 7], negative_ids=[52, 5, 6, 7])],
    [generation([8, 9, 2]), generation([11, 2])],
)
QUESTIONS = [
    Question(number=1, method="logps", arguments=(GROUPS,), options={}),
    Question(number=2, method="contrast_logps", arguments=CONTRAST, options={"eos": False}),
]


def part(step: int) -> list[Sample]:
    draw = Random(step)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(30, 300) for _ in range(draw.randint(low, high))]

    return [
        Sample(group=TokenGroup(ids(2, 12), [ids(2, 9), ids(2, 9)]), ref_logps=(-40.0, -40.0), step=step)
        for _ in range(6)
    ]


def spec(run_dir: Path, model: Path, cache: Path | None, dtype: Any = "float32", **learner: Any) -> LearnerSpec:
    settings = {"lr": 1e-2, "batch_size": 6, "micro_tokens": 40, "cpus": 1, "gpus": 0, **learner}
    frozen = FrozenSpec(
        model_path=str(model), fingerprint=model_fingerprint(str(model)), dtype=dtype, cache=str(cache or run_dir)
    )
    return LearnerSpec(
        section=SelfContrast.model_validate({"type": "self_contrast", "learner": settings}),
        model=Model.model_validate({"path": str(model)}),
        dtype=dtype,
        device="cpu",
        probe=(GROUPS[0],),
        total=STEPS,
        seed=3,
        run_dir=run_dir,
        publishes="adapter",
        frozen=frozen,
    )


def learnt(run_dir: Path) -> dict[str, torch.Tensor]:
    directory = version_directory(run_dir, PolicyRef(policy="self_contrast", version=STEPS))
    return load_file(next(directory.glob("*.safetensors")))


def reference(model: Path, cache: Path | None = None, dtype: Any = "float32") -> Reference:
    return Reference(
        ReferenceSpec(
            model_path=str(model),
            dtype=dtype,
            device="cpu",
            threads=1,
            batch_tokens=4096,
            cache=None if cache is None else str(cache),
        )
    )


def numbers(contrasts: Any) -> list[float]:
    [one] = contrasts
    return [*one.reference, one.chosen_pos, one.chosen_neg, one.rejected_pos, one.rejected_neg]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_learner_in_training_answers_as_a_copy_of_the_base_and_learns_the_same(
    tiny_model: Path, tmp_path: Path, dtype: Any, checkpointing: bool
) -> None:
    parts = {step: part(step) for step in range(1, STEPS + 1)}
    settings = {"dtype": dtype, "gradient_checkpointing": checkpointing}
    silent = MemoryFeed(parts)
    train(spec(tmp_path / "silent", tiny_model, None, **settings), silent, rank=0, world=1)

    micros = (
        len(parts) * 3
    )  # at least so many micro-batches, so that all questions are asked, the last by moved weights
    asked = [
        Question(number=10 + i, method="logps", arguments=([TokenGroup([60 + i], [[70, 71, 72]])],), options={})
        for i in range(micros - 2)
    ]
    feed = MemoryFeed(parts, early=QUESTIONS[:1], questions=[*asked, QUESTIONS[1]])
    train(spec(tmp_path / "asked", tiny_model, None, **settings), feed, rank=0, world=1)
    assert feed.failures == [] and feed.closed and feed.questions == []

    copy = reference(tiny_model, dtype=dtype)
    close: Any = {"abs": 1e-6, "rel": 1e-6} if dtype == "float32" else {"rel": 1e-2}
    for found, expected in zip(feed.answers[1], copy.logps(GROUPS), strict=True):
        assert found == pytest.approx(expected, **close)
    assert numbers(feed.answers[2]) == pytest.approx(numbers(copy.contrast_logps(*CONTRAST, eos=False)), **close)
    for question in asked:
        [found], [expected] = feed.answers[question.number], copy.logps(question.arguments[0])
        assert found == pytest.approx(expected, **close)
    assert {key: sum(one[key] for one in feed.counts) for key in ("hits", "misses")} == copy.counts()

    assert [p.probe_logps for p in feed.published] == [p.probe_logps for p in silent.published]
    assert silent.published[-1].probe_logps != pytest.approx(silent.published[-1].base_probe_logps, abs=1e-2), (
        "it moved"
    )
    expected = learnt(tmp_path / "silent")
    for name, tensor in learnt(tmp_path / "asked").items():
        assert torch.equal(tensor, expected[name]), name


def test_a_copy_finds_what_a_learner_computed_and_the_other_way_round(tiny_model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    feed = MemoryFeed({}, early=QUESTIONS)
    train(spec(tmp_path / "run", tiny_model, cache), feed, rank=0, world=1)
    copy = reference(tiny_model, cache)
    assert copy.logps(GROUPS) == feed.answers[1]
    assert copy.contrast_logps(*CONTRAST, eos=False) == feed.answers[2]
    assert copy.counts() == {"hits": 10, "misses": 0}

    logps = reference(tiny_model, tmp_path / "other").logps(GROUPS)
    again = MemoryFeed({}, early=QUESTIONS)
    train(spec(tmp_path / "again", tiny_model, tmp_path / "other"), again, rank=0, world=1)
    assert again.answers[1] == logps and again.counts == [{"hits": 4, "misses": 0}, {"hits": 0, "misses": 6}]


def test_a_damaged_cache_ends_the_learner_with_its_name(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "logps.sqlite").write_text("these are no log-probs\n" * 100)
    feed = MemoryFeed({})
    train(spec(tmp_path / "run", tiny_model, tmp_path / "cache"), feed, rank=0, world=1)
    [(_, error)] = feed.failures
    assert isinstance(error, RunError) and "logps.sqlite: this cache of log-probs is damaged" in str(error)


def test_the_adapter_is_back_after_an_error(tiny_model: Path) -> None:
    section = SelfContrast.model_validate({"type": "self_contrast"})
    policy = LearnedPolicy(section, Model.model_validate({"path": str(tiny_model)}), "float32", "cpu", 0)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter.add_(0.1)
    before, trained = group_logps(policy.model, GROUPS)[0].tolist(), {n for n, _ in policy.named_trainable()}
    with pytest.raises(ZeroDivisionError), without_adapter(policy.model):
        assert not any(module.training for module in policy.model.modules())
        assert group_logps(policy.model, GROUPS)[0].tolist() != before
        raise ZeroDivisionError
    assert all(module.training for module in policy.model.modules())
    assert group_logps(policy.model, GROUPS)[0].tolist() == before
    assert {n for n, _ in policy.named_trainable()} == trained
