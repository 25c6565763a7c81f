"""The model that a run starts from an adapter with: made once, kept with the run, and known by what it was made of."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from plumbline.config.file import parse_config
from plumbline.config.tree import Config
from plumbline.errors import ModelError
from plumbline.models.logp_cache import model_fingerprint
from plumbline.runs import base
from plumbline.runs.base import check_merged, with_base
from plumbline.runs.policies import base_directory
from plumbline.runs.storage import Storage
from tests.tiny import make_tiny_adapter, tiny_config


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Config:
    tree = tiny_config(tmp_path)
    tree["model"]["adapter"] = str(make_tiny_adapter(tmp_path / "adapter", tmp_path / "model"))
    return parse_config(tree, "tiny.yaml")


def begin(config: Config, run_dir: Path, url: str | None = None) -> Config:
    run_dir.mkdir(exist_ok=True)
    said: list[str] = []
    return with_base(config, run_dir, Storage(run_dir, url), said.append)


def test_it_is_made_once_and_is_everyones_base(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(ModelError, match=r"no `base` in it, π0 with its adapter; `plumbline resume` makes it"):
        base_directory(config, run_dir)
    placed = begin(config, run_dir)
    assert (placed.model.path, placed.model.adapter) == (base_directory(config, run_dir), None)
    assert placed.model.path == str(run_dir / "base") != config.model.path
    assert placed.model.max_len == config.model.max_len
    assert not list(run_dir.glob(".base*")), "nothing is left aside"
    monkeypatch.setattr(base, "_merge", lambda *_: pytest.fail("merged again"))
    assert begin(config, run_dir) == placed


def test_without_an_adapter_nothing_is_made(tmp_path: Path, config: Config) -> None:
    model = config.model.model_copy(update={"adapter": None})
    plain = config.model_copy(update={"model": model})
    assert begin(plain, tmp_path / "run") is plain
    assert not (tmp_path / "run" / "base").exists()


def test_its_tokenizer_is_the_runs(tmp_path: Path, config: Config) -> None:
    other = tmp_path / "tokenizer"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "model" / name, other)
    (other / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    model = config.model.model_copy(update={"tokenizer": str(other)})
    placed = begin(config.model_copy(update={"model": model}), tmp_path / "run")
    assert placed.model.tokenizer is None
    assert "<{{ m.content }}>" in (tmp_path / "run" / "base" / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("file", "key"), [("adapter/adapter_model.safetensors", "adapter"), ("model/model.safetensors", "path")]
)
def test_another_adapter_or_base_is_told(tmp_path: Path, config: Config, file: str, key: str) -> None:
    run_dir = tmp_path / "run"
    check_merged(config, run_dir)
    begin(config, run_dir)
    check_merged(config, run_dir)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for resume in (check_merged, begin):
        with pytest.raises(ModelError, match=rf"^model\.{key}: .*: other files than when the run in .* began, which"):
            resume(config, run_dir)
    (tmp_path / file).write_bytes(content)
    check_merged(config, run_dir)


def test_another_machine_gets_the_very_same(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "store")
    begin(config, tmp_path / "one", url)
    monkeypatch.setattr(base, "_merge", lambda *_: pytest.fail("merged anew, on another processor"))
    begin(config, tmp_path / "two", url)
    assert model_fingerprint(str(tmp_path / "one" / "base")) == model_fingerprint(str(tmp_path / "two" / "base"))


def test_what_failed_leaves_nothing(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ModelError("no tokenizer")

    with monkeypatch.context() as patch:
        patch.setattr(base, "read_tokenizer", fails)
        with pytest.raises(ModelError, match="no tokenizer"):
            begin(config, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    begin(config, tmp_path / "run")
    sources = json.loads((tmp_path / "run" / "base" / "sources.json").read_text())
    assert sources["path"] == model_fingerprint(str(config.model.path))
