"""Sequence classifiers without padding: logits and gradients against the padded forward, and which models have it."""

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from plumbline.models import classifier, shared_prefix
from plumbline.models.classifier import classifier_logits, packs_texts
from tests.varlen import Varlen

V, PAD = 97, 0
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
}
LLAMA: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
MODELS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": lambda **labels: LlamaConfig(**LLAMA, **labels),
    "qwen2": lambda **labels: Qwen2Config(**LLAMA, **labels),
    "mistral": lambda **labels: MistralConfig(**LLAMA, sliding_window=5, **labels),
    "gpt2": lambda **labels: GPT2Config(
        vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL, **labels
    ),
}
PADDED: dict[str, Callable[..., PreTrainedConfig]] = {
    "bert": lambda **labels: BertConfig(**SIZES, **labels),
    "bloom": lambda **labels: BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4, **SPECIAL, **labels),
}


def texts_of(*lengths: int) -> list[list[int]]:
    draw = random.Random(str(lengths))
    return [[draw.randrange(1, V) for _ in range(length)] for length in lengths]


TEXTS = texts_of(7, 1, 20, 3, 12)


def build(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def gradients(model: Any, logits: torch.Tensor) -> list[torch.Tensor]:
    (logits * torch.linspace(-1, 2, logits.numel()).view_as(logits)).sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_padded_forward(name: str, labels: int) -> None:
    padded = build(MODELS[name](num_labels=labels)).eval()
    packed = copy.deepcopy(padded)
    expected, found = classifier._padded_logits(padded, TEXTS), classifier_logits(packed, TEXTS)
    assert packs_texts(packed) and found.shape == (5, labels)
    assert expected.std() > 0.02
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    mine, theirs = gradients(packed, found), gradients(padded, expected)
    assert len(mine) == len(theirs) > 10
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_every_token_is_computed_once_and_no_padding() -> None:
    model = build(MODELS["llama"](num_labels=1)).eval()
    assert packs_texts(model)
    seen: list[torch.Size] = []
    heads: list[torch.Size] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    model.score.register_forward_pre_hook(lambda _, args: heads.append(args[0].shape))
    classifier_logits(model, TEXTS)
    assert seen == [(1, sum(map(len, TEXTS)), 32)] and heads == [(len(TEXTS), 32)]


def test_a_text_that_ends_in_the_token_that_pads_is_read_where_transformers_reads_it() -> None:
    model = build(MODELS["llama"](num_labels=1)).eval()
    texts = [[5, 6, PAD, 7, PAD, PAD], [8, 9, 10, 11, 12, 13, 14], [PAD, PAD]]
    torch.testing.assert_close(
        classifier_logits(model, texts), classifier._padded_logits(model, texts), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", PADDED)
def test_what_is_no_causal_body_under_a_score_is_padded(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(PADDED[name](num_labels=1)).eval()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        found = classifier_logits(model, TEXTS)
        alone = [model(input_ids=torch.tensor([text])).logits[0, 0].item() for text in TEXTS]
    assert not packs_texts(model)
    assert found[:, 0].tolist() == pytest.approx(alone, abs=1e-4)
    warned = [r.getMessage() for r in caplog.records if r.name.startswith("plumbline")]
    assert len(warned) == (name == "bloom"), "an encoder looks both ways, which is no fault of it"


@pytest.mark.parametrize(("name", "taken"), [("bert", True), ("gpt2", True), ("llama", False)])
def test_what_a_tokenizer_returns_beside_the_ids_is_given_to_a_forward_that_takes_it(name: str, taken: bool) -> None:
    model = build((MODELS | PADDED)[name](num_labels=1)).eval()
    beside = [{"token_type_ids": [int(2 * i >= len(t)) for i in range(len(t))], "other": t} for t in TEXTS]
    with torch.no_grad():
        without, found = classifier_logits(model, TEXTS), classifier_logits(model, TEXTS, beside)
        given = [{"token_type_ids": torch.tensor([one["token_type_ids"]])} if taken else {} for one in beside]
        rows = zip(TEXTS, given, strict=True)
        alone = [model(input_ids=torch.tensor([text]), **more).logits[0, 0].item() for text, more in rows]
    assert found[:, 0].tolist() == pytest.approx(alone, abs=1e-4)
    assert ((found - without).abs().max() > 1e-3) == taken


def test_a_model_that_would_be_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose texts see each other differ on the probe."""
    model = build(MODELS["llama"](num_labels=1)).eval()
    monkeypatch.setattr(shared_prefix.Layout, "__init__", _one_segment(shared_prefix.Layout.__init__))
    assert not packs_texts(model)


def _one_segment(init: Any) -> Any:
    def broken(self: Any, groups: Any) -> None:
        init(self, [(sum(prompt for prompt, _ in groups), ())])

    return broken


def test_through_an_adapter_and_with_checkpointing() -> None:
    model = build(MODELS["qwen2"](num_labels=1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    peft = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    peft.train()
    expected = classifier._padded_logits(peft, TEXTS)
    theirs = gradients(peft, expected)
    theirs = [g.clone() for g in theirs]
    peft.zero_grad()
    found = classifier_logits(peft, TEXTS)
    assert packs_texts(peft)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(peft, found), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_one_kernel_takes_all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, with the kernel's stand-in."""
    model = build(MODELS["llama"](num_labels=1)).eval()
    assert packs_texts(model)
    expected = classifier._padded_logits(model, TEXTS)
    kernel = Varlen()
    monkeypatch.setattr(shared_prefix, "varlen_attn", kernel)
    monkeypatch.setattr(shared_prefix, "_has_kernel", lambda query: True)
    found = classifier_logits(model, TEXTS)
    assert kernel.calls == 2, "one a layer"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_packs_too() -> None:
    model = build(MODELS["qwen2"](num_labels=1)).eval().bfloat16()
    assert packs_texts(model)
