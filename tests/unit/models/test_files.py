"""A model's files before anything loads them: each way in which they are none, in one line that says what to do."""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from plumbline.errors import ModelError
from plumbline.models.files import first_not_finite, model_files, size_of
from plumbline.models.loading import check_names, write_shards


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def cut_in_its_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n")


def sharded(file: Path) -> list[Path]:
    weights = load_file(file)
    file.unlink()
    write_shards(file.parent, iter(weights.items()), 200_000)
    return sorted(file.parent.glob("*.safetensors"))


def lose_a_shard(file: Path) -> None:
    sharded(file)[1].unlink()


def cut_a_shard(file: Path) -> None:
    cut(sharded(file)[1])


def lose_the_index(file: Path) -> None:
    sharded(file)
    (file.parent / "model.safetensors.index.json").unlink()


def to_gguf(file: Path) -> None:
    file.rename(file.with_name("q4.gguf"))


def to_adapter(file: Path) -> None:
    file.rename(file.with_name("adapter_model.safetensors"))
    (file.parent / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, r"model/model\.safetensors: it was cut: \d+ bytes are there of \d+; copy or save it again"),
        (cut_in_its_header, r"model\.safetensors: it was cut: 50 bytes are there of \d+"),
        (lambda file: file.write_bytes(b""), r"model\.safetensors: it is empty"),
        (lambda file: file.write_bytes(b"no tensors at all"), r"model\.safetensors: no safetensors file, or a damaged"),
        (pointer, r"model\.safetensors: a Git LFS pointer, not the file itself: `git lfs pull`"),
        (lambda file: pointer(file.with_name("config.json")), r"config\.json: a Git LFS pointer"),
        (lose_a_shard, r"model-00002-of-\d+\.safetensors is not there, which model\.safetensors\.index\.json names"),
        (cut_a_shard, r"model-00002-of-\d+\.safetensors: it was cut"),
        (lose_the_index, r"neither model\.safetensors nor model\.safetensors\.index\.json is in it"),
        (to_gguf, "its weights are in GGUF; give the model that it was made from, in safetensors"),
        (to_adapter, r"an adapter on org/base, no model; merge it into that"),
    ],
)
def test_what_is_no_model_is_told(model: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(model / "model.safetensors")
    with pytest.raises(ModelError, match=told) as caught:
        model_files(str(model), "reward.path")
    assert str(caught.value).startswith("reward.path: ") and "\n" not in str(caught.value)


def test_an_adapter_as_the_model_is_told_where_it_goes(model: Path) -> None:
    to_adapter(model / "model.safetensors")
    with pytest.raises(
        ModelError, match=rf"org/base, no model; give that as `model.path`, and `model.adapter: {model}`$"
    ):
        model_files(str(model), "model.path")


def test_a_gguf_file_as_the_model(tmp_path: Path) -> None:
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"q4\.gguf: a GGUF file; give the model"):
        model_files(str(tmp_path / "q4.gguf"), "model.path")


def test_one_number_that_is_none_is_found(model: Path) -> None:
    file = model / "model.safetensors"
    stored = model_files(str(model), "model.path")
    assert first_not_finite(stored, math.inf) == (None, size_of(stored))
    for value, name in ((torch.nan, "lm_head.weight"), (-torch.inf, "model.norm.weight")):
        weights = load_file(file)
        weights[name].view(-1)[-1] = value
        save_file(weights, file, metadata={"format": "pt"})
        assert first_not_finite(model_files(str(model), "model.path"), math.inf)[0] == name
        weights[name].view(-1)[-1] = 0
        save_file(weights, file, metadata={"format": "pt"})


def test_what_there_is_no_time_for_is_not_looked_at(tiny_model: Path) -> None:
    assert first_not_finite(model_files(str(tiny_model), "model.path"), time.monotonic() - 1) == (None, 0)


@pytest.mark.parametrize("new_head", [False, True])
def test_names_by_headers_alone(model: Path, new_head: bool) -> None:
    """As `load_whole` says of all weights; also of a classifier that is to be trained, whose head alone is new."""
    factory, heads = (AutoModelForSequenceClassification, "new") if new_head else (AutoModelForCausalLM, "whole")
    check_names(factory, str(model), "model.path", model_files(str(model), "model.path"), heads)
    file = model / "model.safetensors"
    save_file({f"module.{k}": v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"^model\.path: .*: it lacks .* more \(there is module\.\S+\); save it whole"):
        check_names(factory, str(model), "model.path", model_files(str(model), "model.path"), heads)
