"""Models by their names on the hub: huggingface_hub itself, with a cache of the test's own and a hub on localhost."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub import Hub, Repo, fill_cache, python, serve_hub
from tests.tiny import make_tiny_embedder, tiny_config, write_config

NAMED = """
import sys
from plumbline.errors import UserError
from plumbline.runs.hub import named_model
for name in sys.argv[1:]:
    try:
        print(named_model(name, "MODEL"))
    except UserError as error:
        print(error)
"""
PINNED = """
import json, sys
from pathlib import Path
from plumbline.config.file import load_config
from plumbline.errors import UserError
from plumbline.runs.hub import fetched, pinned
try:
    kept = pinned(load_config(sys.argv[1]), Path(sys.argv[2]))
    print(json.dumps([kept.model_dump(mode="json"), fetched(kept).model_dump(mode="json")]))
except UserError as error:
    print(error)
"""
OLD = "0" * 39 + "1"
Call = Callable[..., str]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def call(hub: Hub, home: Path, tmp_path: Path) -> Call:
    def call(code: str, *arguments: object, **variables: str) -> str:
        return python(code, *arguments, home=home, url=hub.url, cwd=tmp_path, **variables).strip()

    return call


def test_a_model_is_downloaded_without_pickles_and_code(hub: Hub, home: Path, call: Call, tiny_model: Path) -> None:
    more = {"pytorch_model.bin": b"pickle", "modeling_own.py": b"raise SystemExit", "onnx/model.safetensors": b"other"}
    commit = hub.add("org/Model-1.5B", tiny_model, **more)
    told = call(NAMED, "org/Model-1.5B")
    assert told == str(home / "hub" / "models--org--Model-1.5B" / "snapshots" / commit)
    here = {file.name: file.read_bytes() for file in tiny_model.iterdir()}
    assert {file.name: file.read_bytes() for file in Path(told).iterdir()} == here
    assert hub.downloads() == sorted(here)
    hub.asked.clear()
    assert call(NAMED, "org/Model-1.5B") == told and not hub.asked, "it lies in the cache"
    assert call(NAMED, "org/Model-1.5B", HF_HUB_OFFLINE="1") == told


def test_what_lies_in_the_cache_is_used_from_there(hub: Hub, home: Path, call: Call, tiny_model: Path) -> None:
    """As transformers left it, without a list of what belongs to it; whatever its branch has come to."""
    there, other = (fill_cache(home, "org/model", tiny_model, one, f"v{one[-1]}") for one in (OLD, "0" * 39 + "2"))
    fill_cache(home, "org/main", tiny_model, OLD)
    hub.add("org/main", tiny_model)
    hub.repos["org/main"].commits[OLD] = hub.repos["org/main"].commits[hub.repos["org/main"].refs["main"]]
    main = str(home / "hub" / "models--org--main" / "snapshots" / OLD)
    told = call(NAMED, "org/model@v1", "org/model@v2", "org/main", HF_HUB_OFFLINE="1")
    assert told.splitlines() == [str(there), str(other), main]
    hub.add("org/model", tiny_model)  # without the commits that the cache has
    assert call(NAMED, "org/main", "org/model@v1").splitlines() == [main, str(there)] and not hub.downloads()


def test_what_is_half_in_the_cache_is_completed(hub: Hub, home: Path, call: Call, tiny_model: Path) -> None:
    commit = hub.add("org/model", tiny_model)
    snapshot = fill_cache(home, "org/model", tiny_model, commit)
    (snapshot / "model.safetensors").resolve().unlink()
    (snapshot / "model.safetensors").unlink()
    line = call(NAMED, "org/model", HF_HUB_OFFLINE="1")
    assert line.startswith(
        f"MODEL: org/model: no such directory, not whole in the cache {home / 'hub'}, and HF_HUB_OFF"
    )
    assert call(NAMED, "org/model") == str(snapshot)
    assert hub.downloads() == ["model.safetensors"]


def test_what_cannot_be_had_is_one_line(hub: Hub, home: Path, call: Call, tiny_model: Path, tmp_path: Path) -> None:
    hub.add("org/gated", tiny_model)
    hub.repos["org/gated"].gated = True
    hub.repos["org/pickled"] = Repo()
    hub.repos["org/pickled"].commit({"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    hub.add("org/model", tiny_model)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    names = ("org/gated", "org/pickled", "org/none", "org/model@v7", "runs/model", "no-name", "a/b/c")
    gated, pickled, none, revision, *others = call(NAMED, *names).splitlines()
    assert gated.startswith(
        f"MODEL: org/gated: gated; ask for access on {hub.url}/org/gated, and give a token (`hf auth"
    )
    assert pickled.startswith("MODEL: org/pickled: no *.safetensors in it on the hub; name a revision that has them")
    assert none.startswith(
        f"MODEL: org/none: neither a directory here nor a model on {hub.url}; mend the name, or give a"
    )
    assert (
        revision
        == f"MODEL: org/model@v7: no revision 'v7' on {hub.url}/org/model; name one of its branches, tags or commits"
    )
    assert others == list(names[4:]), "what is a directory, or no name, stays as it is"
    assert not hub.downloads()

    offline = call(NAMED, "org/model@v1", HF_HUB_OFFLINE="1")
    assert (
        "HF_HUB_OFFLINE is set; unset it, or where there is a network: hf download org/model --revision v1" in offline
    )
    unreachable = call(NAMED, "org/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert "not to be had from http://127.0.0.1:9 (ConnectError: " in unreachable
    assert unreachable.endswith("mend that, or where there is a network: hf download org/model")
    assert len([offline, unreachable]) == len(f"{offline}\n{unreachable}".splitlines())


def test_every_place_takes_a_name(hub: Hub, home: Path, call: Call, tiny_model: Path, tmp_path: Path) -> None:
    """And keeps it, with its commit beside it, whatever the branch comes to."""
    config = tiny_config(tmp_path)
    config["model"] = {"path": "org/base", "revision": "v1", "adapter": "org/lora", "tokenizer": "org/words"}
    config["reward"] = {"type": "classifier", "path": "org/reward"}
    config["embedder"] = {"path": "org/sentences"}
    config["data"]["heldout"] = config["data"]["train"]
    config["evaluation"] = {"judge": {"type": "classifier", "path": "org/reward", "revision": "strict"}}
    config["pipelines"].append({"type": "self_contrast", "generation": {"max_tokens": 16}})
    path = write_config(tmp_path, config)

    commits = {"org/base@v1": hub.add("org/base", tiny_model), "org/lora": hub.add("org/lora", tiny_model)}
    hub.repos["org/base"].refs = {"v1": commits["org/base@v1"]}
    commits |= {"org/words": hub.add("org/words", tiny_model), "org/reward": hub.add("org/reward", tiny_model)}
    hub.repos["org/reward"].refs["strict"] = hub.repos["org/reward"].commit({"model.safetensors": b"strict"}, "strict")
    commits["org/reward@strict"] = hub.repos["org/reward"].refs["strict"]
    commits["org/sentences"] = hub.add("org/sentences", make_tiny_embedder(tmp_path / "embedder"))

    kept, local = json.loads(call(PINNED, path, tmp_path / "run"))
    assert kept["commits"] == commits
    assert kept["model"]["path"] == "org/base" and kept["model"]["revision"] == "v1"

    def lies(section: dict[str, str], key: str, name: str) -> None:
        folder = home / "hub" / f"models--{name.partition('@')[0].replace('/', '--')}" / "snapshots" / commits[name]
        assert section[key] == str(folder) and folder.is_dir()

    lies(local["model"], "path", "org/base@v1")
    lies(local["model"], "adapter", "org/lora")
    lies(local["model"], "tokenizer", "org/words")
    lies(local["reward"], "path", "org/reward")
    lies(local["evaluation"]["judge"], "path", "org/reward@strict")
    lies(local["embedder"], "path", "org/sentences")
    assert local["model"]["revision"] is None
    assert not list((home / "hub" / "models--org--words").rglob("*.safetensors")), "weights nobody reads"
    modules = {file.relative_to(tmp_path / "embedder") for file in (tmp_path / "embedder").rglob("*.json")}
    assert all((Path(local["embedder"]["path"]) / file).is_file() for file in modules) and len(modules) > 1

    for repo in hub.repos.values():  # all branches move, and another machine has nothing in its cache
        for branch in list(repo.refs):
            repo.commit({"model.safetensors": b"new", "tokenizer.json": b"{}"}, branch)
    shutil.rmtree(home)
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", {**config, "commits": commits})
    again, there = json.loads(call(PINNED, path, tmp_path / "run"))
    assert (again, there) == (kept, local)
    shutil.rmtree(tmp_path / "run")
    anew, _ = json.loads(call(PINNED, path, tmp_path / "run"))
    assert not set(anew["commits"].values()) & set(commits.values())


def test_the_storage_knows_the_commits_too(hub: Hub, home: Path, call: Call, tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config["storage_path"] = str(tmp_path / "storage")
    config["model"]["path"] = "org/model"
    commit = hub.add("org/model", tiny_model)
    hub.repos["org/model"].commit({"model.safetensors": b"new"})
    (tmp_path / "storage" / "tiny").mkdir(parents=True)
    write_config(tmp_path / "storage" / "tiny", {**config, "commits": {"org/model": commit}})
    kept, _ = json.loads(call(PINNED, write_config(tmp_path, config), tmp_path / "run"))
    assert kept["commits"] == {"org/model": commit}
