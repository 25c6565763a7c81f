"""A working directory with packages of our names does not replace ours."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from plumbline import importing
from plumbline.importing import HOME, PACKAGES, ours_first


@pytest.fixture
def shadow(tmp_path: Path) -> str:
    """A directory with a package and a module of our names, and a module of its own."""
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "__init__.py").write_text("raise ImportError('not ours')\n")
    (tmp_path / "serve.py").write_text("raise ImportError('not ours')\n")
    (tmp_path / "judge.py").write_text("def score(requests):\n    return [1.0 for _ in requests]\n")
    return str(tmp_path)


def test_the_list_is_of_our_packages() -> None:
    assert {path.parent.name for path in Path(HOME).glob("*/__init__.py")} == set(PACKAGES)


def test_what_has_our_names_goes_behind_ours(shadow: str) -> None:
    assert ours_first([shadow, "/lib", HOME, "/site"]) == ["/lib", HOME, shadow, "/site"]
    assert ours_first(["/lib", HOME, shadow]) == ["/lib", HOME, shadow]


def test_an_editable_install_is_on_no_path_and_comes_last(shadow: str) -> None:
    assert ours_first([shadow, "/lib"]) == ["/lib", HOME, shadow]
    assert ours_first(["/mine", "/lib"]) == ["/mine", "/lib", HOME]


def test_an_archive_can_have_our_names(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("serve.py", "")
    assert ours_first([str(tmp_path / "all.zip"), HOME]) == [HOME, str(tmp_path / "all.zip")]


@pytest.mark.parametrize("entry", ["/nowhere", HOME, ""])
def test_what_has_none_stays(entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "actors").mkdir()  # no package
    assert ours_first([entry, "/lib", HOME, "/site"]) == [entry, "/lib", HOME, "/site"]


def test_a_working_directory_that_was_removed_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert ours_first(["a placeholder", "", HOME]) == ["a placeholder", "", HOME]


def test_on_a_machine_that_has_ours_elsewhere_the_path_stays(shadow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "HOME", "/not/here")
    assert ours_first([shadow, "/lib"]) == [shadow, "/lib"]


@pytest.mark.parametrize("packages", [True, False], ids=["packages", "bare folders"])
def test_a_worker_puts_its_path_right_when_it_first_imports_ours(shadow: str, packages: bool) -> None:
    """As Ray does it: the hook comes first, then the driver's working directory, then an actor's class. Ours are found
    as an editable install has them: by a finder behind that of the path."""
    if not packages:
        Path(shadow, "actors/__init__.py").rename(Path(shadow, "actors/scorer.py"))
        Path(shadow, "serve.py").unlink()
        Path(shadow, "serve").mkdir()
        Path(shadow, "serve/errors.py").write_text("raise ImportError('not ours')\n")
    code = (
        "import sys\nfrom ray import cloudpickle\nfrom plumbline import importing\n"
        "cloudpickle.register_pickle_by_value(importing)\n"
        "sys.stdout.buffer.write(cloudpickle.dumps(importing.worker_hook()))\n"
    )
    hook = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, check=True).stdout
    code = (
        "import pickle, sys\npickle.loads(sys.stdin.buffer.read())()\n"
        "assert 'plumbline' not in sys.modules, 'the hook itself imports nothing of ours'\n"
        f"sys.path.insert(0, {shadow!r})\n"
        "import actors.scorer, judge, serve.errors\nprint(actors.__file__, serve.errors.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=shadow, input=hook, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split() == [f"{HOME}/actors/__init__.py", f"{HOME}/serve/errors.py"]
