"""Sizes of models by their files, against the models themselves."""

from pathlib import Path
from typing import Any

import pytest

from plumbline.config.data import Model
from plumbline.errors import ModelError
from plumbline.placement.sizes import Shape, read_model, read_shape


def test_a_model_is_measured_by_its_headers(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    shape = read_shape(tiny_model)
    assert shape.parameters == sum(p.numel() for p in loaded.parameters())
    assert shape.stored == (tiny_model / "model.safetensors").stat().st_size
    assert (shape.layers, shape.hidden, shape.intermediate) == (2, 64, 128)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (2, 2, 32)
    assert shape.vocab == loaded.config.vocab_size


def test_random_weights_are_measured_without_making_any(tiny_model: Path) -> None:
    init = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    init |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    made = read_model(Model.model_validate({"init": init, "tokenizer": str(tiny_model)}))
    assert made.parameters == read_shape(tiny_model).parameters and made.stored == 0


def test_an_adapter_has_as_many_numbers_as_peft_makes(tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert read_shape(tiny_model).adapter(4) == trained


def test_a_damaged_file_is_told(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read .*; save the model again"):
        read_shape(tmp_path)


def test_an_adapter_by_hand() -> None:
    """Grouped queries: q and o 8 to 8, k and v 8 to 4, three of the MLP 8 to 20; rank 2, 3 layers."""
    shape = Shape(parameters=0, layers=3, hidden=8, intermediate=20, heads=2, kv_heads=1, head_dim=4)
    assert shape.adapter(2) == 2 * 3 * (2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 20))
