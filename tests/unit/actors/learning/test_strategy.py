"""How an update is cut into micro-batches, that bfloat16 learns as float32 does, what a config may ask."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Literal

import pytest
import torch

from actors.learning.objectives import SftObjective
from actors.learning.policy import LearnedPolicy
from actors.learning.strategy import Masters, MicroBatch, TorchStrategy, micro_batches, optimizer_keys
from plumbline.config.data import Model
from plumbline.config.learner import Learner
from plumbline.config.pipelines import Sft
from plumbline.config.tree import Config
from plumbline.records import Sample, TokenGroup
from plumbline.runs.checkpoint import Checkpoint, write_manifest, write_pieces


def batch(*tokens: int) -> list[Sample]:
    """A sample of so many tokens each."""
    return [Sample(group=TokenGroup([1], [[2] * (n - 1)])) for n in tokens]


def sizes(micros: list) -> list[tuple[list[int], float]]:
    return [([s.group.tokens for s in micro.samples], micro.share) for micro in micros]


def test_every_worker_has_as_many_micro_batches_though_their_samples_differ() -> None:
    # Largest first into the emptier shard: 9 to one worker; 5, 4 and, as 9 = 9, 3 to the first again.
    samples = batch(9, 5, 4, 3)
    assert sizes(micro_batches(samples, 2, 0, token_budget=9)) == [([9], 0.25), ([3], 0.25)]
    assert sizes(micro_batches(samples, 2, 1, token_budget=9)) == [([5, 4], 0.5), ([3], 0.0)]


def test_a_worker_without_a_sample_computes_the_smallest_for_nothing() -> None:
    assert sizes(micro_batches(batch(7, 4), 3, 2, token_budget=9)) == [([4], 0.0)]


def test_shares_of_all_workers_sum_to_one() -> None:
    samples = batch(9, 5, 4, 3, 8, 2, 6)
    for world in (1, 2, 3):
        micros = [micro_batches(samples, world, rank, token_budget=10) for rank in range(world)]
        assert sum(micro.share for mine in micros for micro in mine) == pytest.approx(1.0)
        assert len({len(mine) for mine in micros}) == 1
        trained = [s.group.tokens for mine in micros for micro in mine if micro.share for s in micro.samples]
        assert sorted(trained) == [2, 3, 4, 5, 6, 8, 9]


def test_optimizer_keys_by_index() -> None:
    found = optimizer_keys(["model.a.b", "optimizer.0.exp_avg", "optimizer.11.step", "rng.torch", "optimizer.0.step"])
    assert found == {0: ["exp_avg", "step"], 11: ["step"]}


def test_zero_belongs_to_deepspeed() -> None:
    assert Learner.model_validate({"strategy": "deepspeed", "zero": 3}).zero == 3
    with pytest.raises(ValueError, match="`zero` needs `strategy: deepspeed` beside it"):
        Learner.model_validate({"zero": 3})


def test_a_full_policy_has_the_generators_to_itself() -> None:
    def config(*pipelines: dict) -> Config:
        return Config.model_validate(
            {
                "name": "a",
                "model": {"path": "m"},
                "data": {"train": {"path": "d"}},
                "reward": {"type": "program", "function": "a:b"},
                "pipelines": list(pipelines),
            }
        )

    full = {"type": "ple", "policy": {"type": "full"}}
    config(full, {"type": "sft"}, {"type": "reward"})
    config({"type": "ple"}, {"type": "raft"})
    with pytest.raises(ValueError, match="of 'ple' replaces the weights of all generators; give it a run of its own"):
        config(full, {"type": "raft"})


# What the optimiser sees of weights in bfloat16


RNG = Random(0)
GROUPS = [TokenGroup(RNG.choices(range(5, 60), k=6), [RNG.choices(range(5, 60), k=8)]) for _ in range(8)]


class Unmastered:
    """What there was before `Masters`: the optimiser works on the weights as they are."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters: Sequence[torch.nn.Parameter] = parameters

    def write_back(self) -> None: ...


def strategy(model: Path, dtype: Literal["float32", "bfloat16"], policy: str) -> TorchStrategy:
    section = Sft.model_validate({"policy": {"type": policy}, "learner": {"weight_decay": 0.1}})
    learned = LearnedPolicy(section, Model(path=str(model)), dtype, "cpu", seed=0)
    return TorchStrategy(learned, section.learner, "cpu", world=1)


def train(one: TorchStrategy, lr: float, updates: int = 100) -> float:
    """Mean loss of the last update, each in two micro-batches."""
    halves = [[Sample(group=group) for group in half] for half in (GROUPS[:4], GROUPS[4:])]
    micros = [MicroBatch(samples=half, share=0.5) for half in halves]
    losses = [one.update(SftObjective().loss, micros, lr).results for _ in range(updates)]
    return sum(loss.item() for loss, _ in losses[-1]) / 2


@pytest.mark.parametrize("policy", ["full", "lora"])
def test_bfloat16_learns_as_float32_does(tiny_model: Path, policy: str) -> None:
    expected = train(strategy(tiny_model, "float32", policy), 5e-5)
    assert train(strategy(tiny_model, "bfloat16", policy), 5e-5) == pytest.approx(expected, rel=0.02)


def test_without_masters_it_would_not(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = train(strategy(tiny_model, "bfloat16", "full"), 0.0, updates=1)
    with_masters = train(strategy(tiny_model, "bfloat16", "full"), 2e-5)
    monkeypatch.setattr("actors.learning.strategy.Masters", Unmastered)
    without = train(strategy(tiny_model, "bfloat16", "full"), 2e-5)
    assert started - without < 0.1 * (started - with_masters)


@pytest.mark.parametrize("policy", ["full", "lora"])
def test_a_bfloat16_checkpoint_is_of_what_the_optimiser_sees(tiny_model: Path, tmp_path: Path, policy: str) -> None:
    one, other = (strategy(tiny_model, "bfloat16", policy) for _ in range(2))
    train(one, 1e-4, updates=3)
    state = {name: piece.values for name, piece in one.state().items()}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    write_manifest(tmp_path, 1, [write_pieces(tmp_path, 1, one.state()).name], {})
    with Checkpoint.opened(tmp_path, 1) as saved:
        other.load(saved)
    assert {p.dtype for _, p in other.weights(trainable=True)} == {torch.bfloat16}, "what is published"
    for name, weight in other.weights(trainable=True):
        assert torch.equal(weight, state[f"model.{name}"].bfloat16())
    assert train(one, 1e-4, updates=3) == train(other, 1e-4, updates=3)


def test_gradients_are_summed_in_float32(tiny_model: Path) -> None:
    """A sum of many small ones after a large one, in bfloat16, would stay where it is."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    masters = Masters([weight])
    for share in (1.0, *[2.0**-9] * 64):
        (weight * share).sum().backward()
    assert weight.grad is None
    assert masters.parameters[0].grad is not None and masters.parameters[0].grad.item() == 1.125


def test_float32_weights_are_their_own_masters() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    assert Masters([weight]).parameters[0] is weight
