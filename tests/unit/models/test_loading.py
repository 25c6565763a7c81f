"""A model is read whole or not at all: each way in which its files can be damaged, in one line that names it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from plumbline.errors import ModelError
from plumbline.models.loading import load_whole, write_shards

Weights = dict[str, Tensor]
DOWN, EMBEDDINGS = "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"


@pytest.fixture
def damaged(tiny_model: Path, tmp_path: Path) -> Callable[[Callable[[Weights], Weights]], str]:
    """A copy of the tiny model with other weights in its file."""

    def damage(change: Callable[[Weights], Weights]) -> str:
        shutil.copytree(tiny_model, tmp_path / "model")
        file = tmp_path / "model" / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        return str(tmp_path / "model")

    return damage


def with_one(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, name: change(weights[name].clone())}


def one_nan(weight: Tensor) -> Tensor:
    weight[3, 5] = torch.nan
    return weight


@pytest.mark.parametrize("factory", [AutoModelForCausalLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weights: {k: v for k, v in weights.items() if k != DOWN}, f"it lacks {DOWN}; save it whole again"),
        (
            lambda weights: {f"x.{k}": v for k, v in weights.items()},
            "model.embed_tokens.weight",
        ),
        (lambda weights: {**weights, "model.foo": torch.zeros(2)}, "knows nothing of: model.foo; save it whole again"),
        (with_one(EMBEDDINGS, lambda w: w[:-3].clone()), f"another shape than its config.json says: {EMBEDDINGS};"),
        (with_one(EMBEDDINGS, one_nan), f"{EMBEDDINGS} has values that are no finite numbers"),
        (with_one(DOWN, lambda w: w / 0), f"{DOWN} has values that are no finite numbers"),
    ],
    ids=["missing", "prefixed", "unknown", "shape", "nan", "inf"],
)
def test_what_is_damaged_is_named(damaged: Callable[..., str], factory: Any, change: Any, told: str) -> None:
    path = damaged(change)
    with pytest.raises(ModelError) as caught:
        load_whole(factory, path, "float32", new_head=factory is AutoModelForSequenceClassification)
    assert str(caught.value).startswith(f"model {path}: ") and told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_many_missing_some_are_named(damaged: Callable[..., str]) -> None:
    with pytest.raises(ModelError, match=r"lacks (\S+, ){2}\S+ and \d+ more;"):
        load_whole(
            AutoModelForCausalLM, damaged(lambda weights: {"lm_head.weight": weights["lm_head.weight"]}), "float32"
        )


def test_a_new_head_is_meant_to_be_random_and_another_is_not(tiny_model: Path) -> None:
    model = load_whole(AutoModelForSequenceClassification, str(tiny_model), "float32", new_head=True, num_labels=1)
    assert model.score.weight.shape[0] == 1
    with pytest.raises(ModelError, match=r"it lacks score\.weight"):
        load_whole(AutoModelForSequenceClassification, str(tiny_model), "float32", num_labels=1)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", None])
def test_a_file_that_is_none_is_one_line(tiny_model: Path, tmp_path: Path, content: bytes | None) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)  # None: it was cut
    with pytest.raises(ModelError, match=r"model .*: cannot be loaded \(\w+: [^\n]*\)$"):
        load_whole(AutoModelForCausalLM, str(tmp_path / "model"), "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_a_whole_model_is_as_its_files_have_it(tiny_model: Path, dtype: str) -> None:
    model = load_whole(AutoModelForCausalLM, str(tiny_model), dtype)
    kept = load_file(tiny_model / "model.safetensors")
    assert model.dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, kept[name].to(weight.dtype))


@pytest.mark.parametrize(("most", "files"), [(10**9, 1), (200_000, None), (1, 21)])
def test_weights_in_several_files_are_read_as_one_model(
    tiny_model: Path, tmp_path: Path, most: int, files: int | None
) -> None:
    """None is held for longer than its file is written; one that is larger than a file may be has one of its own."""
    kept = load_file(tiny_model / "model.safetensors")
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    write_shards(tmp_path / "model", iter(kept.items()), most)
    written = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(written) == files if files else 1 < len(written) < len(kept)
    largest = max(weight.nbytes for weight in kept.values())
    assert all(sum(w.nbytes for w in load_file(file).values()) <= max(most, largest) for file in written)
    model = load_whole(AutoModelForCausalLM, str(tmp_path / "model"), "float32")
    assert all(torch.equal(weight, kept[name]) for name, weight in model.named_parameters())
