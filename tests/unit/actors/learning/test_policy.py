"""The weights that a learner trains: what its probe measures, and in how many forward passes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learning.objectives import DpoObjective
from actors.learning.policy import LearnedPolicy, load_model, probe_logps
from actors.learning.strategy import TorchStrategy, portion_of
from plumbline.config.data import Model
from plumbline.config.pipelines import SelfContrast, Sft
from plumbline.models.group_logps import group_logps, sequence_logps, supports_shared_prefix
from plumbline.models.loading import load_whole
from plumbline.records import PolicyRef, Publication, Sample, TokenGroup

PROBE = [TokenGroup([5, 6, 7], [[8, 9]]), TokenGroup([5], [[6, 7, 8], [9]]), TokenGroup([5, 6], [[7]])]


@pytest.mark.parametrize(("micro_tokens", "rows"), [(100, [13]), (5, [5, 5, 3]), (1, [5, 4, 3, 2])])
def test_a_probe_keeps_to_the_tokens_of_a_forward(tiny_model: Path, micro_tokens: int, rows: list[int]) -> None:
    model = load_model(Model(path=str(tiny_model)), "float32").eval()
    with torch.no_grad():
        sums, tokens = sequence_logps(model, PROBE)
    expected = (sums[tokens > 0] / tokens[tokens > 0]).tolist()
    assert probe_logps(model, PROBE, 100) == pytest.approx(expected, rel=1e-4)  # it tries the model out, once
    seen: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    assert probe_logps(model, PROBE, micro_tokens) == pytest.approx(expected, rel=1e-4)
    assert sorted(seen, reverse=True) == rows


def test_without_a_probe_there_is_nothing(tiny_model: Path) -> None:
    assert probe_logps(None, [], 8) == []


def learned(model: Path, policy: dict[str, Any], seed: int = 0) -> LearnedPolicy:
    """A policy whose adapter says something: fresh, PEFT's B is zero."""
    section = Sft.model_validate({"policy": {"type": "lora", **policy}})
    one = LearnedPolicy(section, Model(path=str(model)), "float32", "cpu", seed)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in one.trainable:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return one


def test_target_modules_alone_get_an_adapter(tiny_model: Path) -> None:
    one = learned(tiny_model, {"target_modules": ["q_proj", "up_proj"]})
    assert {name.split(".")[-4] for name, _ in one.named_trainable()} == {"q_proj", "up_proj"}


def test_an_adapters_files_name_its_modules_in_one_order(tiny_model: Path, tmp_path: Path) -> None:
    """PEFT holds them in a set, whose order is another in each process."""
    nothing = Publication(
        ref=PolicyRef(policy="sft", version=1),
        files={},
        probe_logps=[],
        previous_probe_logps=[],
        base_probe_logps=[],
    )
    learned(tiny_model, {}).save(tmp_path / "v", nothing, adapter=True)
    named = json.loads((tmp_path / "v" / "adapter_config.json").read_text())["target_modules"]
    assert len(named) == 14 and named == sorted(named)


def test_rslora_scales_by_the_root_of_the_rank(tiny_model: Path) -> None:
    """alpha / √r = 10 / 4 is the plain scaling of alpha 40 at r = 16."""
    root, plain = (
        learned(tiny_model, {"r": 16, "alpha": alpha, "rslora": rslora}).probe(PROBE)
        for alpha, rslora in ((10, True), (40, False))
    )
    assert root == pytest.approx(plain, abs=1e-6)
    assert root != pytest.approx(learned(tiny_model, {"r": 16, "alpha": 10}).probe(PROBE), abs=1e-3)


def test_dropout_acts_in_updates_and_not_in_probes(tiny_model: Path) -> None:
    one, without = learned(tiny_model, {"dropout": 0.5}), learned(tiny_model, {})
    assert one.model.training and supports_shared_prefix(one.model) and one.model.training
    assert one.probe(PROBE) == pytest.approx(without.probe(PROBE), abs=1e-6)
    assert one.model.training, "a probe leaves the mode as it was"
    first, second, plain = (group_logps(model, PROBE)[0].detach() for model in (one.model, one.model, without.model))
    assert not torch.allclose(first, second, atol=1e-3) and not torch.allclose(first, plain, atol=1e-3)


def test_the_models_own_dropout_is_off(tiny_model: Path) -> None:
    one = learned(tiny_model, {"dropout": 0.5})
    assert {m.p for n, m in one.model.named_modules() if isinstance(m, torch.nn.Dropout) and "lora" not in n} <= {0.0}
    assert {m.p for n, m in one.model.named_modules() if isinstance(m, torch.nn.Dropout) and "lora" in n} == {0.5}


def test_pieces_drop_the_same_inputs_in_both_passes(tiny_model: Path) -> None:
    """The gradient is that of the loss which was computed: along it, the loss of the same draws falls as it says."""
    group = TokenGroup([5, 6, 7], [[8, 9, 10], [11, 12], [13, 14, 15], [16]])
    samples = [Sample(group=group, ref_logps=(-15.0, -10.0, -15.0, -5.0))]
    section = SelfContrast.model_validate(
        {"type": "self_contrast", "policy": {"type": "lora", "dropout": 0.5}, "learner": {"clip_norm": 1e9}}
    )

    def update(shift: float, gradients: list[torch.Tensor] | None) -> tuple[float, list[torch.Tensor]]:
        one = LearnedPolicy(section, Model(path=str(tiny_model)), "float32", "cpu", 0)
        torch.manual_seed(7)
        with torch.no_grad():
            for i, parameter in enumerate(one.trainable):
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
                if gradients:
                    parameter.sub_(gradients[i], alpha=shift)
        torch.manual_seed(11)
        done = TorchStrategy(one, section.learner, "cpu", 1).update(
            DpoObjective(section), portion_of(samples, 1, 0, token_budget=6), 1e-12
        )
        return done.results[0].loss.item(), [p.grad.clone() for p in one.trainable if p.grad is not None]

    loss, gradients = update(0.0, None)
    size = sum(float((g * g).sum()) for g in gradients)
    shift = 0.01 / size
    assert (loss - update(shift, gradients)[0]) == pytest.approx(0.01, rel=0.1)


def test_layers_that_are_trained_whole_are_merged(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    one = learned(tiny_model, {"modules_to_save": ["lm_head", "norm"]})
    expected = one.probe(PROBE)
    whole = {name.split(".")[-4] for name, _ in one.named_trainable() if "modules_to_save" in name}
    assert whole >= {"lm_head", "norm"}
    publication = Publication(
        ref=PolicyRef(policy="sft", version=1),
        files={},
        probe_logps=expected,
        previous_probe_logps=expected,
        base_probe_logps=expected,
    )
    one.save(tmp_path / "v1", publication, adapter=False)
    merged = load_whole(AutoModelForCausalLM, str(tmp_path / "v1"), "float32").eval()
    assert probe_logps(merged, PROBE, 100) == pytest.approx(expected, abs=1e-4)
    base = load_whole(AutoModelForCausalLM, str(tiny_model), "float32").eval()
    assert probe_logps(base, PROBE, 100) != pytest.approx(expected, abs=1e-2)
