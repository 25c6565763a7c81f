"""Which code and packages a run was started with: by git, by the package, by the lock that is installed."""

import json
import re
import subprocess
from hashlib import sha256
from importlib import metadata
from pathlib import Path

import pytest

from plumbline.errors import DataError
from plumbline.runs.origin import FILE, Origin, keep_origin, origin, read_origins


def git(home: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    ran = subprocess.run(["git", "-C", str(home), *who, *arguments], capture_output=True, text=True, check=True)
    return ran.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    home = tmp_path / "checkout"
    (home / "plumbline").mkdir(parents=True)
    (home / "plumbline/__init__.py").write_text("")
    git(home, "init", "-q")
    return home


def test_the_code_is_a_commit_and_whether_it_was_changed(checkout: Path) -> None:
    version = f"plumbline {metadata.version('plumbline')}"
    assert origin(checkout).code == version, "git does not know this package: the checkout is somebody else's"
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "a")
    commit = git(checkout, "rev-parse", "HEAD")
    assert origin(checkout).code == f"commit {commit}"
    (checkout / "plumbline/__init__.py").write_text("changed = 1\n")
    assert origin(checkout).code == f"commit {commit}, changed since"
    assert origin(checkout.parent).code == version, "no checkout at all"


def test_a_lock_is_named_where_all_of_it_is_installed(tmp_path: Path) -> None:
    locks = tmp_path / "locks"
    locks.mkdir()
    (locks / "exclude.txt").write_text("# nothing\ntriton; python_version < '3'\n")
    (locks / "a.txt").write_text(f"pyarrow=={metadata.version('pyarrow')}\nno-such-package==1.0\n")
    assert origin(tmp_path).lock == ""
    text = (
        f"ray[default,serve]=={metadata.version('ray')}\nPyYAML=={metadata.version('pyyaml')} ; sys_platform != 'x'\n"
    )
    (locks / "b.txt").write_text(text)
    assert origin(tmp_path).lock == f"b.txt {sha256(text.encode()).hexdigest()}"
    assert re.fullmatch("[0-9a-f]{64}", origin(tmp_path).packages)


def test_each_start_by_other_code_is_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (Origin(code=f"commit {name}", lock="", packages="0") for name in "ab")
    for now in (one, one, two, two):
        monkeypatch.setattr("plumbline.runs.origin.origin", lambda now=now, **_: now)
        assert keep_origin(tmp_path) == tmp_path / FILE
    assert read_origins(tmp_path) == [one, two]


@pytest.mark.parametrize(
    "text", ["{", "[1]", '[{"code": "a"}]', "5", json.dumps([{"code": "a", "lock": "", "more": ""}])]
)
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match=r"origin\.json: no list of origins; remove it"):
        read_origins(tmp_path)


def test_what_is_installed_does_not_depend_on_what_was_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = origin(tmp_path)
    (tmp_path / "vendored-9.9.dist-info").mkdir()
    (tmp_path / "vendored-9.9.dist-info/METADATA").write_text("Name: vendored\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert metadata.version("vendored") == "9.9" and origin(tmp_path) == before
