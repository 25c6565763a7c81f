"""How an update is cut into micro-batches, what a checkpoint's tensors mean, and what a config may ask of learners."""

import pytest
import torch

from actors.learning.strategy import micro_batches, optimizer_state
from plumbline.config.learner import Learner
from plumbline.config.tree import Config
from plumbline.records import Sample, TokenGroup


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


def test_optimizer_tensors_by_index_and_key() -> None:
    one, two = torch.ones(2), torch.zeros(())
    found = optimizer_state({"model.a.b": one, "optimizer.0.exp_avg": one, "optimizer.11.step": two, "rng.torch": two})
    assert found == {0: {"exp_avg": one}, 11: {"step": two}}


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
