"""FLOPs of training, worked by hand for SmolLM2-135M, and as torch counts them."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
)

from plumbline.models.flops import TrainingCost, card_peak, seen_keys, training_cost
from plumbline.models.group_logps import disable_dropout, group_logps
from plumbline.records import TokenGroup

SMOL: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SMALL: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def smol() -> Any:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SMOL))


def test_all_weights_of_smollm2_by_hand() -> None:
    # A layer: q and o 576 · 576, k and v 576 · 192, three of 576 · 1536: 3,538,944 weights. The head: 49152 · 576.
    # Attention: 12 · 9 heads · 64 a layer.
    cost = training_cost(smol())
    assert cost == TrainingCost(token=6 * 30 * 3_538_944, scored=6 * 28_311_552, pairs=((None, 30 * 12 * 576),))
    assert cost is not None
    # A prompt of 3, answers of 2 and 1: 6 tokens, 3 of them scored. The prompt's 1 + 2 + 3 pairs, then 4 + 5, then 4.
    assert cost.of([TokenGroup([1, 2, 3], [[4, 5], [6]])]) == 6 * cost.token + 3 * cost.scored + 19 * 30 * 12 * 576
    assert cost.of([TokenGroup([1, 2], [[3]])] * 2) == 6 * cost.token + 2 * cost.scored + 12 * 30 * 12 * 576


def test_an_adapter_on_smollm2_by_hand() -> None:
    # r = 8: q and o 8 · 1152, k and v 8 · 768, three of 8 · 2112 a layer: 81,408 weights. The base is frozen.
    peft = get_peft_model(smol(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    cost = training_cost(peft)
    assert cost is not None
    assert cost.token == 30 * (4 * 3_538_944 + 6 * 81_408)
    assert cost.scored == 4 * 28_311_552


def test_a_window_by_hand() -> None:
    assert [seen_keys(n, None) for n in (0, 1, 4)] == [0, 1, 10]
    assert [seen_keys(n, 3) for n in (2, 3, 5)] == [3, 6, 12]
    cost = training_cost(AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=5)))
    assert cost is not None and cost.pairs == ((5, 3 * 12 * 64),)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_as_torch_counts_them(name: str, adapter: bool) -> None:
    """Within 3 %: torch counts every query with every key, and no gradient of what enters the first adapter."""
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=200, n_embd=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
    config = LlamaConfig(**SMALL, num_key_value_heads=2) if name == "llama" else gpt2
    model: Any = AutoModelForCausalLM.from_config(config).train()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    disable_dropout(model)
    groups = [TokenGroup(list(range(9)), [[5] * 7, [6] * 4]), TokenGroup([1, 2, 3], [[4] * 6])]
    group_logps(model, groups)  # its probe is not to be counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no CPU kernel's FLOPs
        group_logps(model, groups)[0].sum().backward()
    cost = training_cost(model)
    assert cost is not None
    assert cost.of(groups) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_classifier_has_a_body_alone() -> None:
    causal = training_cost(LlamaForCausalLM(LlamaConfig(**SMALL)))
    labels: dict[str, Any] = {"num_labels": 1}
    classifier = training_cost(AutoModelForSequenceClassification.from_config(LlamaConfig(**SMALL, **labels)))
    assert causal is not None and classifier is not None
    assert classifier.token - causal.token == 6 * 64, "its head of one row is counted with the body"
    assert classifier.scored == 0 and classifier.pairs == causal.pairs


@pytest.mark.parametrize("kind", ["encoder", "experts", "mixer"])
def test_what_the_count_would_be_wrong_for_has_none(kind: str) -> None:
    with torch.device("meta"):
        models: dict[str, Any] = {
            "encoder": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
            "experts": lambda: AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_key_value_heads=2)),
            "mixer": lambda: AutoModelForCausalLM.from_config(MambaConfig(hidden_size=32, num_hidden_layers=1)),
        }
        assert training_cost(models[kind]()) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A10", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_a_cards_peak(name: str, peak: float | None) -> None:
    assert card_peak(name) == peak
