"""What was exported, pushed: huggingface_hub itself, against a hub on localhost."""

from pathlib import Path

import pytest

from tests.hub import Repo, python, serve_hub

PUSH = """
import sys
from pathlib import Path
from plumbline.errors import UserError
from plumbline.runs.push import check_push, push_model
for name in sys.argv[2:]:
    try:
        check_push(name)
        print(push_model(Path(sys.argv[1]), name, "ple@12 of my-run"))
    except UserError as error:
        print(error)
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("---\nbase_model: org/base\n---\n# ple@12\n")
    (out / "model.safetensors").write_bytes(bytes(range(256)))
    return out


def test_it_is_there_file_by_file_and_private(tmp_path: Path, out: Path) -> None:
    files = {file.name: file.read_bytes() for file in out.iterdir()}
    with serve_hub() as hub:
        hub.tokens = {"hf_writes": True}
        hub.repos["me/seen"] = Repo()
        hub.repos["me/seen"].commit({})
        told = python(PUSH, out, "me/new", "me/seen", home=tmp_path, url=hub.url, cwd=tmp_path, HF_TOKEN="hf_writes")
        assert told.splitlines() == [f"{hub.url}/me/new (private)", f"{hub.url}/me/seen (public)"]
        for name in ("me/new", "me/seen"):
            repo = hub.repos[name]
            assert {k: v for k, v in repo.commits[repo.refs["main"]].items() if k != ".gitattributes"} == files
        assert hub.repos["me/new"].private
    assert {file.name: file.read_bytes() for file in out.iterdir()} == files


def test_what_is_refused_is_one_line_and_leaves_the_export(tmp_path: Path, out: Path) -> None:
    files = {file.name: file.read_bytes() for file in out.iterdir()}
    later = f"{out} is whole; push it again by: hf upload me/new {out}"
    with serve_hub() as hub:
        hub.tokens = {"hf_reads": False, "hf_writes": True}

        def push(*names: str, **variables: str) -> str:
            return python(PUSH, out, *names, home=tmp_path, url=hub.url, cwd=tmp_path, **variables).strip()

        none, bare, token = push("a/b/c", "model", "me/new").splitlines()
        assert none == "--push a/b/c: no name of a model on the hub; write ORG/MODEL, or your user's name for ORG"
        assert bare.startswith("--push model: no name of a model on the hub")
        assert token == f"--push me/new: no token for {hub.url}; `hf auth login`, or HF_TOKEN, gives one that may write"
        assert not hub.asked
        offline = push("me/new", HF_HUB_OFFLINE="1", HF_TOKEN="hf_writes")
        assert offline == "--push me/new: HF_HUB_OFFLINE is set; unset it, or push later: `hf upload me/new OUT`"
        reads = push("me/new", HF_TOKEN="hf_reads")
        assert reads.startswith(f"--push me/new: {hub.url}: refuses it (403: Your token may not write here.); `hf auth")
        assert reads.endswith(later) and "\n" not in reads
        wrong = push("me/new", HF_TOKEN="hf_nobodys")
        assert wrong.startswith(f"--push me/new: {hub.url}: refuses it (401: ") and wrong.endswith(later)
        away = push("me/new", HF_TOKEN="hf_writes", HF_ENDPOINT="http://127.0.0.1:9")
        assert away.startswith("--push me/new: http://127.0.0.1:9: ConnectError: ") and away.endswith(later)
        (out / "README.md").write_text("---\nbase_model: /here\n---\n")
        card = push("me/new", HF_TOKEN="hf_writes")
        assert card.startswith(
            f"--push me/new: {hub.url}: ValueError: Invalid metadata in README.md. - no model: base_model: /"
        )
        assert card.endswith(later) and "\n" not in card
        (out / "README.md").write_bytes(files["README.md"])
    assert {file.name: file.read_bytes() for file in out.iterdir()} == files
