"""What a learner minimises: PLE's replay of D under the present threshold, and how samples are cut into updates."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learning.objectives import (
    Objective,
    PleObjective,
    Result,
    RewardObjective,
    SftObjective,
    build_objective,
    even_chunks,
)
from actors.learning.policy import load_model
from plumbline.config.data import Model
from plumbline.config.pipelines import Ple, RewardModel, Sft
from plumbline.models.group_logps import group_logps
from plumbline.records import Completion, Message, Prompt, Sample, TokenGroup
from plumbline.runs.parts import Parts
from plumbline.runs.rollouts import PLE_SCHEMA, ple_row, ple_sample


def section(**changes: Any) -> Ple:
    return Ple.model_validate({"type": "ple", "learner": {"batch_size": 4}, **changes})


def row(step: int, number: int, rewards: tuple[float, float] = (0.0, 1.0)) -> dict[str, object]:
    prompt = Prompt(id=f"{step}-{number}", messages=(Message(role="user", content="Why?"),))
    return ple_row(
        step=step,
        prompt=prompt,
        prompt_ids=[5, 6],
        plain=Completion(text="a", ids=[7, number], finish_reason="stop"),
        guided=Completion(text="b", ids=[8, number, 9], finish_reason="length"),
        rewards=rewards,
        version=step - 1,
        staleness=0,
        engine="generator-0",
    )


def part(step: int, rows: int = 3) -> list[Sample]:
    return [ple_sample(row(step, number)) for number in range(rows)]


def steps_of(updates: Sequence[Sequence[Sample]]) -> list[int]:
    return sorted(sample.step for sample in itertools.chain.from_iterable(updates))


def loss_of(objective: Objective, model: torch.nn.Module, samples: Sequence[Sample]) -> Result:
    return objective.loss(objective.forward(model, [s.group for s in samples]), samples)


def objective(tmp_path: Path, **changes: Any) -> PleObjective:
    return PleObjective(section(**changes), tmp_path / "parts", seed=0)


# D and its window


def test_a_row_becomes_both_answers_under_the_plain_prompt() -> None:
    assert ple_sample(row(2, 4, (0.25, -1.5))) == Sample(
        group=TokenGroup([5, 6], [[7, 4], [8, 4, 9]]), rewards=(0.25, -1.5), step=2
    )


def test_every_step_trains_on_all_of_d(tmp_path: Path) -> None:
    ple = objective(tmp_path)
    assert steps_of(list(ple.updates(1, part(1)))) == [1] * 3
    assert steps_of(list(ple.updates(2, part(2)))) == [1] * 3 + [2] * 3
    assert steps_of(list(ple.updates(3, part(3)))) == [1] * 3 + [2] * 3 + [3] * 3
    assert ple.figures()["replayed"] == 9


def test_a_window_keeps_the_newest_steps(tmp_path: Path) -> None:
    ple = objective(tmp_path, replay_window=2)
    for step in (1, 2, 3):
        updates = list(ple.updates(step, part(step)))
    assert steps_of(updates) == [2] * 3 + [3] * 3
    assert ple.figures()["replayed"] == 6


def test_updates_are_even_and_every_sample_is_in_one(tmp_path: Path) -> None:
    ple = objective(tmp_path)
    list(ple.updates(1, part(1, 6)))
    updates = list(ple.updates(2, part(2, 3)))
    assert [len(update) for update in updates] == [3, 3, 3]
    seen = sorted((s.step, s.group.response_ids[0][1]) for update in updates for s in update)
    assert seen == [(1, n) for n in range(6)] + [(2, n) for n in range(3)]


def test_the_order_changes_with_the_step_and_repeats_with_the_seed(tmp_path: Path) -> None:
    def orders(seed: int) -> list[list[int]]:
        ple = PleObjective(section(replay_window=1), tmp_path, seed)
        return [
            [s.group.response_ids[0][1] for update in ple.updates(step, part(step, 12)) for s in update]
            for step in (1, 2)
        ]

    assert orders(0) == orders(0)
    assert orders(0)[0] != orders(0)[1]
    assert orders(0) != orders(1)


@pytest.mark.parametrize("window", [None, 1, 2, 9])
def test_a_restored_d_is_the_one_that_was(tmp_path: Path, window: int | None) -> None:
    parts = Parts(str(tmp_path / "parts"), PLE_SCHEMA)
    for step in (1, 2, 3, 4):
        parts.write(step, [row(step, number) for number in range(3)])

    def samples(step: int) -> list[Sample]:
        return [ple_sample(row) for row in parts.read(step)]

    straight, resumed = objective(tmp_path, replay_window=window), objective(tmp_path, replay_window=window)
    straight.restore(0)
    for step in (1, 2, 3):
        list(straight.updates(step, samples(step)))
    resumed.restore(3)
    assert list(resumed.updates(4, samples(4))) == list(straight.updates(4, samples(4)))
    assert resumed.figures() == straight.figures()


def test_steps_after_the_checkpoint_are_not_restored(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path / "parts"), PLE_SCHEMA)
    for step in (1, 2, 3):
        parts.write(step, [row(step, 0)])
    ple = objective(tmp_path)
    ple.restore(1)
    assert steps_of(list(ple.updates(2, part(2, 1)))) == [1, 2]


# The threshold


def test_the_threshold_shrinks_by_a_tenth_every_step(tmp_path: Path) -> None:
    ple = objective(tmp_path, replay_window=1)
    taus = []
    for step in range(1, 21):
        list(ple.updates(step, part(step, 1)))
        taus.append(ple.figures()["tau"])
    assert taus[:4] == pytest.approx([0.2, 0.18, 0.162, 0.1458])
    assert taus[19] == pytest.approx(0.0270, abs=5e-5)


def test_a_resumed_run_goes_on_with_the_threshold_of_its_step(tmp_path: Path) -> None:
    ple = objective(tmp_path, replay_window=1)
    list(ple.updates(20, part(20, 1)))
    assert ple.figures()["tau"] == pytest.approx(0.0270, abs=5e-5)


def test_stored_scores_are_classified_anew_by_the_present_threshold(tmp_path: Path, tiny_model: Path) -> None:
    """s' - s is 0.19: weighted SFT at τ = 0.2, the ranking loss as soon as τ is 0.18 (METHODS.md §3)."""
    model = load_model(Model.model_validate({"path": str(tiny_model)}), "float32")
    ple = objective(tmp_path)
    sample = ple_sample(row(1, 3, (0.5, 0.69)))
    shares, losses = [], []
    for step in (1, 2):
        [[first, *_]] = ple.updates(step, [sample] if step == 1 else [])
        loss, metrics = loss_of(ple, model, [first])
        shares.append(metrics["rank_share"].item())
        losses.append(loss.item())
    assert shares == [0.0, 1.0]
    logps, tokens = group_logps(model, [sample.group])
    plain, guided = logps[0].tolist()
    assert tokens[0].tolist() == [2, 3]
    assert losses[0] == pytest.approx(0.0947159 * (plain - guided), rel=1e-4)  # tanh(0.095) = 0.0947159
    assert losses[1] == pytest.approx(plain / 2 - guided / 3, rel=1e-4)


def test_the_loss_is_a_mean_so_that_cutting_a_batch_changes_nothing(tmp_path: Path, tiny_model: Path) -> None:
    model = load_model(Model.model_validate({"path": str(tiny_model)}), "float32")
    ple = objective(tmp_path)
    rewards = [(0.0, 1.0), (0.5, 0.4), (0.1, 0.2), (-1.0, 2.0)]
    samples = [ple_sample(row(1, number, one)) for number, one in enumerate(rewards)]
    list(ple.updates(1, samples))
    whole, _ = loss_of(ple, model, samples)
    singles = [loss_of(ple, model, [sample])[0].item() for sample in samples]
    assert whole.item() == pytest.approx(sum(singles) / 4, rel=1e-4)


def test_the_sections_flags_reach_the_loss(tmp_path: Path, tiny_model: Path) -> None:
    model = load_model(Model.model_validate({"path": str(tiny_model)}), "float32")
    samples = [ple_sample(row(1, 0, (0.0, 1.0))), ple_sample(row(1, 1, (1.0, 0.0)))]

    def parts_of(**changes: Any) -> tuple[float, dict[str, float]]:
        ple = objective(tmp_path, **changes)
        list(ple.updates(1, samples))
        loss, metrics = loss_of(ple, model, samples)
        return loss.item(), {key: value.item() for key, value in metrics.items()}

    loss, metrics = parts_of()
    assert loss == pytest.approx(metrics["rank_loss"] + metrics["sft_loss"])
    assert parts_of(rank_weight=0)[0] == pytest.approx(metrics["sft_loss"])
    assert parts_of(sft_weight=0)[0] == pytest.approx(metrics["rank_loss"])
    assert parts_of(length_normalize_sft=True)[1]["sft_loss"] != pytest.approx(metrics["sft_loss"])
    assert metrics["rank_loss"] < -0.1
    assert parts_of(hinge=0.1)[1]["rank_loss"] == pytest.approx(-0.05)  # of two prompts, one is ranked
    assert parts_of(tau0=5)[1]["rank_share"] == 0.0


# Chunks


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(0, 4, []), (1, 4, [1]), (4, 4, [4]), (5, 4, [2, 3]), (9, 4, [3, 3, 3]), (65, 64, [32, 33]), (3, 1, [1, 1, 1])],
)
def test_chunks_are_few_and_even(count: int, size: int, sizes: list[int]) -> None:
    samples = [Sample(group=TokenGroup([1], [[i]])) for i in range(count)]
    chunks = list(even_chunks(samples, size))
    assert sorted(map(len, chunks)) == sizes
    assert [sample for chunk in chunks for sample in chunk] == samples


# The other objectives


def test_each_section_gets_its_own_objective(tmp_path: Path) -> None:
    kinds = {
        PleObjective: section(),
        SftObjective: Sft(),
        RewardObjective: RewardModel.model_validate({"type": "reward"}),
    }
    for kind, one in kinds.items():
        assert type(build_objective(one, tmp_path, 0)) is kind


def test_sft_is_the_mean_over_prompts_of_their_own_token_means(tiny_model: Path) -> None:
    model = load_model(Model.model_validate({"path": str(tiny_model)}), "float32")
    samples = [Sample(group=TokenGroup([5, 6], [[7]])), Sample(group=TokenGroup([5], [[8, 9, 10]]))]
    [update] = SftObjective().updates(1, samples)
    assert update == samples
    loss, _ = loss_of(SftObjective(), model, samples)
    logps, _ = group_logps(model, [s.group for s in samples])
    assert loss.item() == pytest.approx(-(logps[0, 0].item() + logps[1, 0].item() / 3) / 2, rel=1e-5)


class FirstToken(torch.nn.Module):
    """A classifier whose logit is its text's first token, divided by ten, less one."""

    class config:
        pad_token_id = 0

    device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = input_ids[:, :1].float() / 10 - 1
        return type("Output", (), {"logits": logits})


def labelled(token: int, label: float) -> Sample:
    return Sample(group=TokenGroup([], [[token, 3]]), rewards=(label,))


def test_a_reward_model_learns_labels_by_cross_entropy() -> None:
    reward = RewardObjective(RewardModel.model_validate({"type": "reward"}))
    loss, metrics = loss_of(reward, FirstToken(), [labelled(30, 1.0), labelled(20, 0.0)])
    # Logits 2 and 1: -log σ(2) = 0.126928, -log(1 - σ(1)) = 1.313262.
    assert loss.item() == pytest.approx((0.126928 + 1.313262) / 2, abs=1e-5)
    assert metrics["accuracy"].item() == 0.5


def test_a_reward_model_learns_pairs_by_bradley_terry() -> None:
    reward = RewardObjective(RewardModel.model_validate({"type": "reward", "source": "pairs"}))
    pairs = [Sample(group=TokenGroup([], [[30], [20, 4]])), Sample(group=TokenGroup([], [[10, 5, 6], [30]]))]
    loss, metrics = loss_of(reward, FirstToken(), pairs)
    # Margins 1 and -2: -log σ(1) = 0.313262, -log σ(-2) = 2.126928.
    assert loss.item() == pytest.approx((0.313262 + 2.126928) / 2, abs=1e-5)
    assert metrics["accuracy"].item() == 0.5


def test_a_reward_model_learns_on_the_segments_that_it_is_scored_by() -> None:
    class Segments(FirstToken):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: Any = None) -> Any:
            logits = token_type_ids.sum(1, keepdim=True).float()
            return type("Output", (), {"logits": logits})

    reward = RewardObjective(RewardModel.model_validate({"type": "reward", "source": "pairs", "reads": "pair"}))
    beside = [{"token_type_ids": [0, 1, 1]}, {"token_type_ids": [0, 0, 1, 0]}]
    scores, _ = reward.forward(Segments(), [TokenGroup([], [[5, 6, 7], [5, 6, 7, 8]], beside)])
    assert scores.tolist() == [[2.0, 1.0]]
