"""An adapter and the model that it is merged into: what belongs together, and what comes of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from plumbline.errors import ModelError
from plumbline.models.merging import check_adapter, merge_adapter
from tests.tiny import make_tiny_adapter

IDS = torch.arange(24)[None]


@pytest.fixture
def adapter(tmp_path: Path, tiny_model: Path) -> Path:
    return make_tiny_adapter(tmp_path / "adapter", tiny_model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "use_dora": True},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_as_peft_computes_it(tmp_path: Path, tiny_model: Path, settings: dict[str, Any]) -> None:
    adapter = make_tiny_adapter(tmp_path / "adapter", tiny_model, **settings)
    assert check_adapter(str(adapter), str(tiny_model)) == f"with a LoRA adapter of rank 4 in {adapter}"
    (tmp_path / "merged").mkdir()
    merge_adapter(str(adapter), str(tiny_model), tmp_path / "merged")
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(adapter)))
    assert (before - expected).abs().max() > 1
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4
    )


def test_in_bfloat16_the_sum_is_rounded_once(tmp_path: Path, tiny_model: Path) -> None:
    adapter = make_tiny_adapter(tmp_path / "adapter", tiny_model)
    for directory, dtype in (("half", torch.bfloat16), ("merged", None)):
        (tmp_path / directory).mkdir()
        if dtype:
            AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).save_pretrained(tmp_path / directory)
    merge_adapter(str(adapter), str(tmp_path / "half"), tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    exact: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()  # type: ignore[operator]
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    for name, weight in exact.state_dict().items():
        assert torch.equal(found[name], weight.to(torch.bfloat16)), name
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def change(**settings: object) -> Callable[[Path], None]:
    def changed(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return changed


def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def changed(adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return changed


def pickled(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            shutil.rmtree,
            r"adapter: no such directory; give a PEFT adapter's \(adapter_config\.json, adapter_model",
        ),
        (lambda a: (a / "adapter_config.json").unlink(), r"no adapter: there is no adapter_config\.json in it; give"),
        (lambda a: (a / "adapter_config.json").write_text("["), r"adapter_config\.json: not a JSON object"),
        (lambda a: (a / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors in it; save it with"),
        (pickled, r"no adapter_model\.safetensors in it \(adapter_model\.bin can run code when it is read\); save it"),
        (
            lambda a: (a / "adapter_model.safetensors").write_bytes(b""),
            r"adapter_model\.safetensors: it is empty",
        ),
        (change(peft_type="IA3"), r"an adapter of type IA3; a run starts from LoRA: merge this one into its base"),
        (change(peft_type="NEW"), r"adapter_config\.json cannot be read \("),
        (change(r="four"), r"adapter_config\.json cannot be read|does not fit "),
        (change(task_type="SEQ_CLS"), "an adapter for SEQ_CLS; a run's is for CAUSAL_LM"),
        (
            change(target_modules=["wq"]),
            r"does not fit .*, whose linear layers are down_proj, .* \(\w+: Target modules .*wq",
        ),
        (change(r=8), r"made on another model than .*: it has another shape than in the model: model\.layers"),
        (rewrite(lambda w: w.pop(Q)), r"made on another .*: it lacks model\.layers\.0\.self_attn\.q_proj\.lora_A\.wei"),
        (rewrite(lambda w: w.update({"x.lora_A.weight": w[Q] * 1})), r"has what the model has no place for: x\.lora_A"),
    ],
)
def test_what_does_not_belong_together(
    tiny_model: Path, adapter: Path, damage: Callable[[Path], None], told: str
) -> None:
    damage(adapter)
    with pytest.raises(ModelError, match=told) as caught:
        check_adapter(str(adapter), str(tiny_model))
    assert str(caught.value).startswith("model.adapter: ") and "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_named_with_its_own(tmp_path: Path, tiny_model: Path, adapter: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    file = other / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 1}))
    with pytest.raises(ModelError, match=rf"made on another .*no place for: model\.layers\.1\..* \({tiny_model}\)$"):
        check_adapter(str(adapter), str(other))


def test_tied_embeddings_stay_one(tmp_path: Path, tiny_model: Path) -> None:
    tied = tmp_path / "tied"
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=True)
    model.save_pretrained(tied)
    fine = make_tiny_adapter(tmp_path / "fine", tied)
    assert check_adapter(str(fine), str(tied))
    wrong = make_tiny_adapter(tmp_path / "wrong", tied, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ModelError, match=r"changes model\.embed_tokens, which is one tensor with the other embedding"):
        check_adapter(str(wrong), str(tied))


def test_numbers_that_are_none_are_not_merged(tmp_path: Path, tiny_model: Path, adapter: Path) -> None:
    rewrite(lambda weights: weights[Q].fill_(torch.nan))(adapter)
    with pytest.raises(ModelError, match=r"q_proj\.weight has values that are no finite numbers"):
        merge_adapter(str(adapter), str(tiny_model), tmp_path)
    assert not (tmp_path / "config.json").exists()
