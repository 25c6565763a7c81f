"""How an update is cut into micro-batches, that bfloat16 learns as float32 does, what a config may ask."""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.learning.objectives import DpoObjective, Scores, SftObjective
from actors.learning.policy import LearnedPolicy
from actors.learning.strategy import (
    Masters,
    MicroBatch,
    Portion,
    Result,
    TorchStrategy,
    backward_passes,
    optimizer_keys,
    portion_of,
)
from plumbline.config.data import Model
from plumbline.config.learner import Learner
from plumbline.config.pipelines import SelfContrast, Sft
from plumbline.config.tree import Config
from plumbline.models.group_logps import pieces
from plumbline.records import Sample, TokenGroup
from plumbline.runs.checkpoint import Checkpoint, write_manifest, write_pieces

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def batch(*tokens: int) -> list[Sample]:
    """A sample of so many tokens each."""
    return [Sample(group=TokenGroup([1], [[2] * (n - 1)])) for n in tokens]


def sizes(portion: Portion) -> tuple[list[tuple[list[int], float]], int]:
    """Of every micro-batch its samples' tokens and its share; how many passes there are, with those for nothing."""
    micros = [([s.group.tokens for s in micro.samples], micro.share) for micro in portion.micro_batches]
    return micros, portion.passes


def test_every_worker_has_as_many_passes_though_their_samples_differ() -> None:
    # Largest first into the emptier shard: 9 to one worker; 5, 4 and, as 9 = 9, 3 to the first again.
    samples = batch(9, 5, 4, 3)
    assert sizes(portion_of(samples, 2, 0, token_budget=9)) == ([([9], 0.25), ([3], 0.25)], 2)
    assert sizes(portion_of(samples, 2, 1, token_budget=9)) == ([([5, 4], 0.5)], 2)


def test_a_worker_without_a_sample_computes_the_smallest_for_nothing() -> None:
    portion = portion_of(batch(7, 4), 3, 2, token_budget=9)
    assert sizes(portion) == ([], 1)
    assert portion.filler.tokens == 4


def test_shares_of_all_workers_sum_to_one() -> None:
    samples = batch(9, 5, 4, 3, 8, 2, 6)
    for world in (1, 2, 3):
        portions = [portion_of(samples, world, rank, token_budget=10) for rank in range(world)]
        micros = [micro for portion in portions for micro in portion.micro_batches]
        assert sum(micro.share for micro in micros) == pytest.approx(1.0)
        assert len({portion.passes for portion in portions}) == 1
        trained = [s.group.tokens for micro in micros for s in micro.samples]
        assert sorted(trained) == [2, 3, 4, 5, 6, 8, 9]


# Groups above the budget


def dpo_sample(prompt: int, *responses: int) -> Sample:
    draw = Random(len(responses))
    ids = [draw.choices(range(5, 60), k=n) for n in (prompt, *responses)]
    group = TokenGroup(ids[0], ids[1:])
    return Sample(group=group, ref_logps=tuple(-5.0 * n for n in responses))


LONG = dpo_sample(10, 7, *[5, 9, 8, 6] * 4)
"""16 negatives: 129 tokens."""


def update(samples: list[Sample], token_budget: int, dtype: torch.dtype, **learner: Any) -> tuple[Any, ...]:
    """Of one update on a model with random weights: loss, metrics, norm, gradients."""
    torch.manual_seed(0)
    settings = Learner(clip_norm=1e9, lr=1e-9, **learner)
    model: Any = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.to(dtype).train()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy: Any = SimpleNamespace(model=model, named_trainable=lambda: model.named_parameters())
    one = TorchStrategy(policy, settings, "cpu", world=1)
    objective = DpoObjective(SelfContrast(type="self_contrast"))
    done = one.update(objective, portion_of(samples, 1, 0, token_budget), 1e-9)
    sums: dict[str, float] = {}
    for result in done.results:
        for key, value in {"loss": result.loss, **result.metrics}.items():
            sums[key] = sums.get(key, 0.0) + value.item() * result.share
    gradients = [p.grad.clone() for p in one._masters.parameters if p.grad is not None]
    return sums, done.grad_norm, gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("budget", [40, 1])
def test_a_group_in_pieces_is_the_whole_group(dtype: torch.dtype, tolerance: float, budget: int) -> None:
    """Also where the prompt alone is above the budget; beside other groups, which are not cut."""
    samples = [dpo_sample(3, 2, 4), LONG, dpo_sample(4, 3, 2, 5)]
    whole, pieces = (update(samples, tokens, dtype) for tokens in (1000, budget))
    assert pieces[0] == pytest.approx(whole[0], rel=tolerance, abs=tolerance)
    assert pieces[1] == pytest.approx(whole[1], rel=tolerance) and whole[1] > 0.1
    for one, other in zip(pieces[2], whole[2], strict=True):
        assert (one - other).norm() <= tolerance * other.norm() + 1e-7


def test_pieces_go_with_gradient_checkpointing() -> None:
    whole, pieces = (
        update([LONG], tokens, torch.float32, gradient_checkpointing=checkpointing)
        for tokens, checkpointing in ((1000, False), (40, True))
    )
    for one, other in zip(pieces[2], whole[2], strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7


class Held:
    """A tensor that is kept for the backward pass: how many numbers there are of them, and were at the most."""

    now = most = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        Held.now += tensor.numel()
        Held.most = max(Held.most, Held.now)

    def __del__(self) -> None:
        Held.now -= self.tensor.numel()


def test_pieces_keep_the_activations_of_one() -> None:
    def most(samples: list[Sample], token_budget: int) -> int:
        Held.now = Held.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            update(samples, token_budget, torch.float32)
        return Held.most

    assert max(piece.tokens for piece in pieces(LONG.group, 40)) == 39
    alone = most([dpo_sample(10, 15, 14)], 40)
    assert most([LONG], 40) < 1.1 * alone
    assert most([LONG], 1000) > 2 * alone


def test_all_workers_compute_as_often_though_one_alone_has_pieces() -> None:
    samples = [LONG, *batch(30, 30, 30, 30)]
    one, two = (portion_of(samples, 2, rank, token_budget=40) for rank in (0, 1))
    assert [len(micro.passes) for micro in one.micro_batches] == [5]
    assert [len(micro.passes) for micro in two.micro_batches] == [1, 1, 1, 1]
    assert (one.drafts, one.passes) == (two.drafts, two.passes) == (5, 5)
    calls = []
    for portion in (one, two):
        seen: list[bool] = []

        class Counting(SftObjective):
            def forward(self, model: Any, groups: Sequence[TokenGroup], seen: list[bool] = seen) -> Scores:
                assert all(group.tokens <= 40 for group in groups)
                seen.append(torch.is_grad_enabled())
                tokens = torch.tensor([[len(r) for r in g.response_ids] for g in groups])
                return -tokens.float().requires_grad_(), tokens

        def draft(work: Callable[[Any], Any]) -> Any:
            with torch.no_grad():
                return work(None)

        results: list[Result] = []
        for work in backward_passes(Counting(), portion, draft, results):
            work(None).backward()
        assert len(results) == len(portion.micro_batches)
        calls.append(seen)
    assert calls[0] == calls[1] == [False] * 5 + [True] * 5


# Of a checkpoint, and of a config


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
    halves = [
        MicroBatch(samples=[Sample(group=group) for group in half], share=0.5, passes=[half])
        for half in (GROUPS[:4], GROUPS[4:])
    ]
    portion = Portion(micro_batches=halves, filler=GROUPS[0], drafts=0, passes=2)
    losses = [one.update(SftObjective(), portion, lr).results for _ in range(updates)]
    return sum(result.loss.item() * result.share for result in losses[-1])


@pytest.mark.parametrize("policy", ["full", "lora"])
def test_bfloat16_learns_as_float32_does(tiny_model: Path, policy: str) -> None:
    expected = train(strategy(tiny_model, "float32", policy), 5e-5)
    assert train(strategy(tiny_model, "bfloat16", policy), 5e-5) == pytest.approx(expected, rel=0.02)


def test_at_a_rate_below_bfloat16s_steps_weights_move_as_in_float32(tiny_model: Path) -> None:
    moved = {}
    for dtype in ("float32", "bfloat16"):
        one = strategy(tiny_model, dtype, "full")
        before = {name: piece.values.clone() for name, piece in one.state().items() if name.startswith("model.")}
        train(one, 5e-6, updates=10)
        moved[dtype] = {name: one.state()[name].values - then for name, then in before.items()}
    assert moved["bfloat16"]
    for name, expected in moved["float32"].items():
        found = moved["bfloat16"][name]
        assert (found == 0).float().mean() <= (expected == 0).float().mean() + 0.01, name
        assert found.norm().item() == pytest.approx(expected.norm().item(), rel=0.1), name


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
