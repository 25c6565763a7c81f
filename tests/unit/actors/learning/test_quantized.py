"""A base in 4 bits under an adapter, and an optimiser whose state is in 8: bitsandbytes itself, on the CPU."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.learning.objectives import SftObjective
from actors.learning.policy import LearnedPolicy, probe_logps
from actors.learning.strategy import TorchStrategy, portion_of
from actors.reference import Reference, ReferenceSpec
from plumbline.config.data import Model
from plumbline.config.pipelines import Sft
from plumbline.models.group_logps import supports_shared_prefix
from plumbline.models.loading import load_whole
from plumbline.models.logp_cache import model_fingerprint
from plumbline.records import PolicyRef, Publication, Sample, TokenGroup
from plumbline.runs.checkpoint import Checkpoint, write_manifest, write_pieces

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
GROUPS = [TokenGroup([5 + i, 6, 7], [[8 + i, 9, 10, 11]]) for i in range(6)]
SAMPLES = [Sample(group=group) for group in GROUPS]
ADAPTER = {"type": "lora", "r": 16}


def learner(
    model: Path, dtype: Literal["float32", "bfloat16"] = "float32", policy: Any = ADAPTER, **settings: Any
) -> tuple[LearnedPolicy, TorchStrategy]:
    section = Sft.model_validate({"policy": policy, "learner": {"lr": 1e-2, **settings}})
    learned = LearnedPolicy(section, Model(path=str(model)), dtype, "cpu", seed=0)
    return learned, TorchStrategy(learned, section.learner, "cpu", world=1)


def train(strategy: TorchStrategy, updates: int) -> list[float]:
    portion = portion_of(SAMPLES, 1, 0, 1000)
    return [strategy.update(SftObjective(), portion, 1e-2).results[0].loss.item() for _ in range(updates)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_on_a_base_in_four_bits_learns(tiny_model: Path, dtype: Literal["float32", "bfloat16"]) -> None:
    learned, strategy = learner(tiny_model, dtype, quantize="nf4")
    frozen = {name: p for name, p in learned.model.named_parameters() if not p.requires_grad}
    packed = {name.split(".")[-3] for name, p in frozen.items() if p.dtype == torch.uint8}
    assert packed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {p.dtype for p in learned.trainable} == {getattr(torch, dtype)}
    assert supports_shared_prefix(learned.model)
    before = {name: p.clone() for name, p in frozen.items()}
    losses = train(strategy, 20)
    assert losses[-1] < losses[0] - 1
    assert all(torch.equal(before[name], p) for name, p in frozen.items()), "the base stays"


def test_a_merged_model_has_the_whole_base(tiny_model: Path, tmp_path: Path) -> None:
    """What the adapter changed is added to weights that were not rounded to 4 bits."""
    learned, strategy = learner(tiny_model, quantize="nf4")
    train(strategy, 3)
    probe = learned.probe(GROUPS)
    ref = PolicyRef(policy="sft", version=1)
    publication = Publication(ref=ref, files={}, probe_logps=probe, previous_probe_logps=probe, base_probe_logps=probe)
    weights = dict(strategy.weights(trainable=True))
    learned.save(tmp_path / "whole", publication, weights.items(), adapter=False)
    whole = load_whole(AutoModelForCausalLM, str(tmp_path / "whole"), "float32").eval()
    plain, _ = learner(tiny_model)
    with torch.no_grad():
        for name, parameter in plain.named_trainable():
            parameter.copy_(weights[name])
    assert probe_logps(whole, GROUPS, 1000) == pytest.approx(plain.probe(GROUPS), abs=1e-4)
    assert probe_logps(whole, GROUPS, 1000) != pytest.approx(probe, abs=1e-3)


def test_a_reference_in_four_bits_is_what_the_learner_starts_from(tiny_model: Path, tmp_path: Path) -> None:
    learned, _ = learner(tiny_model, quantize="nf4")
    spec: dict[str, Any] = {"model_path": str(tiny_model), "dtype": "float32", "device": "cpu", "threads": 1}
    found = {}
    for quantize in ("nf4", None):  # of one cache: neither is given the other's
        reference = Reference(ReferenceSpec(**spec, batch_tokens=100, cache=str(tmp_path), quantize=quantize))
        found[quantize] = [row[0] / 4 for row in reference.logps(GROUPS)]
        assert reference.fingerprint() == model_fingerprint(str(tiny_model), quantize)
    assert found["nf4"] == pytest.approx(learned.probe(GROUPS), abs=1e-4)
    assert found[None] != pytest.approx(found["nf4"], abs=1e-2)


@pytest.mark.parametrize("policy", [ADAPTER, {"type": "full"}])
def test_eight_bits_of_state_go_on_from_a_checkpoint(tiny_model: Path, tmp_path: Path, policy: Any) -> None:
    _, one = learner(tiny_model, policy=policy, optimizer="adamw_8bit")
    _, other = learner(tiny_model, policy=policy, optimizer="adamw_8bit")
    losses = train(one, 3)
    assert losses[-1] < losses[0]
    state = one.state()
    kinds = {
        name.rpartition(".")[2]: piece.values.dtype for name, piece in state.items() if name.startswith("optimizer.")
    }
    assert (policy is ADAPTER) or kinds["state1"] == torch.uint8, "a small weight's state stays in float32"
    write_manifest(tmp_path, 1, [write_pieces(tmp_path, 1, state).name], {})
    with Checkpoint.opened(tmp_path, 1) as saved:
        other.load(saved)
    assert train(one, 4) == train(other, 4)
    for (name, weight), (_, same) in zip(one.weights(trainable=True), other.weights(trainable=True), strict=True):
        assert torch.equal(weight, same), name


def test_eight_bits_of_state_learn_as_thirty_two_do(tiny_model: Path) -> None:
    losses = [
        train(learner(tiny_model, policy={"type": "full"}, optimizer=kind)[1], 8)[-1]
        for kind in ("adamw", "adamw_8bit")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
