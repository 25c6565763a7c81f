"""How fast a learner trains, by hand, and as a share of what its cards could."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.learning.pace import Pace
from plumbline.models.flops import training_cost
from plumbline.records import TokenGroup

GROUPS = [TokenGroup([1, 2, 3], [[4, 5], [6]]), TokenGroup([1], [[2, 3]])]


@pytest.mark.parametrize(("card", "known"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA A10", False)])
def test_mfu_is_of_all_workers_cards(card: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    cost = training_cost(model)
    assert cost is not None
    figures = Pace(model, "cuda", world=2).figures(GROUPS, seconds=0.5)
    assert figures["learner_tokens_per_s"] == (6 + 3) / 0.5
    assert figures.get("mfu") == (pytest.approx(cost.of(GROUPS) / (0.5 * 2 * 989e12)) if known else None)


def test_a_cpu_has_no_peak() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    pace = Pace(model, "cpu", world=1)
    assert list(pace.figures(GROUPS, seconds=1.0)) == ["learner_tokens_per_s"] and pace.gpu() == {}
