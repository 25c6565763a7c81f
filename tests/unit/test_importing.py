"""A working directory with packages of our names does not replace ours."""

import subprocess
import sys
from pathlib import Path

import pytest

from plumbline import importing
from plumbline.importing import HOME, PACKAGES, ours_first, with_working_directory


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
    assert ours_first([shadow, "/lib"]) == ["/lib", HOME, shadow]


@pytest.mark.parametrize("entry", ["/nowhere", HOME, ""])
def test_what_has_none_stays(entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "actors").mkdir()  # no package
    assert ours_first([entry, "/lib", HOME, "/site"]) == [entry, "/lib", HOME, "/site"]


def test_on_a_machine_that_has_ours_elsewhere_the_path_stays(shadow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "HOME", "/not/here")
    assert ours_first([shadow, "/lib"]) == [shadow, "/lib"]


def test_a_reward_is_looked_up_in_the_working_directory_before_the_rest(
    shadow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_working_directory(["/lib", HOME]) == ["/lib", HOME, shadow]
    (tmp_path / "serve.py").unlink()
    (tmp_path / "actors" / "__init__.py").unlink()
    assert with_working_directory(["/lib", HOME]) == [shadow, "/lib", HOME]


def test_a_worker_puts_its_path_right_when_it_first_imports_ours(shadow: str) -> None:
    """As Ray does it: the hook comes first, then the driver's working directory, then an actor's class."""
    code = (
        "import sys\nfrom ray import cloudpickle\nfrom plumbline import importing\n"
        "cloudpickle.register_pickle_by_value(importing)\n"
        "sys.stdout.buffer.write(cloudpickle.dumps(importing.worker_hook()))\n"
    )
    hook = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, check=True).stdout
    code = (
        "import pickle, sys\npickle.loads(sys.stdin.buffer.read())()\n"
        "assert 'plumbline' not in sys.modules, 'the hook itself imports nothing of ours'\n"
        f"sys.path[:0] = [{shadow!r}, {HOME!r}]\n"
        "import actors, judge, serve\nprint(actors.__file__, serve.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=shadow, input=hook, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split() == [f"{HOME}/actors/__init__.py", f"{HOME}/serve/__init__.py"]
