"""Digests of weights: equal where the numbers are, whatever they lie in, and different for every kind of damage."""

import pytest
import torch

from plumbline.models import digest as module
from plumbline.models.digest import adapter_digests, digest, lora_scalings, weight_digests


def weights(rows: int = 40, columns: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_the_same_numbers_in_another_dtype() -> None:
    rounded = weights().bfloat16()
    assert digest(rounded) == digest(rounded.float())
    assert digest(rounded) != digest(weights())


def test_the_same_numbers_among_zeros() -> None:
    """An adapter of rank 24 in a slot for 64."""
    slot = torch.zeros(40, 64)
    slot[:, :24] = weights()
    assert digest(slot) == digest(weights())
    assert digest(torch.zeros(3, 3)) == "0" * 16


def test_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digest(weights())
    monkeypatch.setattr(module, "CHUNK", 100)
    assert digest(weights()) == whole


def test_a_view_is_its_own_numbers() -> None:
    assert digest(weights().T) == digest(weights().T.contiguous())
    assert digest(weights().T) != digest(weights())


@pytest.mark.parametrize("place", [(0, 0), (39, 23), (17, 5)])
def test_one_bit_of_one_number(place: tuple[int, int]) -> None:
    changed = weights()
    changed.view(torch.int32)[place] ^= 1
    assert digest(changed) != digest(weights())


def test_rows_and_numbers_that_changed_places() -> None:
    swapped = weights()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert digest(swapped) != digest(weights())
    assert digest(-weights()) != digest(weights())
    assert digest(weights().flip(1)) != digest(weights())


def test_thousands_of_tensors_have_as_many_digests() -> None:
    assert len({digest(weights(2, 2, seed)) for seed in range(3000)}) == 3000


def test_vectors_and_single_numbers() -> None:
    assert digest(torch.tensor(1.5)) == digest(torch.tensor([1.5])) == digest(torch.tensor([[1.5]]))
    assert len(digest(torch.arange(5.0))) == 16


def test_an_adapter_as_engines_of_both_dtypes_hold_it() -> None:
    """vLLM multiplies B by the scaling in its own dtype."""
    a, b = weights(4, 24), weights(40, 4, seed=1)
    found = adapter_digests({"q_proj": (a, b, 1.7)}, torch.float32)
    assert found["float32"]["q_proj"] == digest(a) + digest(b * 1.7)
    scaled = b.bfloat16()
    scaled *= 1.7
    assert found["bfloat16"]["q_proj"] == digest(a.bfloat16()) + digest(scaled)
    published = adapter_digests({"q_proj": (a, b, 1.7)}, torch.bfloat16)
    assert published["float32"]["q_proj"] == digest(a.bfloat16()) + digest(b.bfloat16().float() * 1.7)


def test_whole_weights_as_engines_of_both_dtypes_hold_them() -> None:
    one = {"model.norm.weight": weights()}
    assert weight_digests(one, torch.float32) == {
        "float32": {"model.norm.weight": digest(weights())},
        "bfloat16": {"model.norm.weight": digest(weights().bfloat16())},
    }
    rounded = digest(weights().bfloat16())
    both = {form: {"model.norm.weight": rounded} for form in ("float32", "bfloat16")}
    assert weight_digests(one, torch.bfloat16) == both


def test_names_and_scalings_are_those_of_the_wrapped_model() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))
    assert lora_scalings(model, "default") == {"model.layers.0.self_attn.q_proj": 1.5}
