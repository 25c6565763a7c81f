"""A run from a folder that has packages of our names, with the wheel installed and from a checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

from plumbline.importing import PACKAGES
from tests.runs import LIMIT_S, MARK, leftovers
from tests.tiny import tiny_config, write_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
JUDGE = """
from words import WANTED

def score(requests):
    return [float(sum(word in WANTED for word in request.response.split())) for request in requests]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts of a fresh environment with our wheel in it, as deploy/Dockerfile makes one, and the lock's packages."""
    directory = tmp_path_factory.mktemp("installed")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, directory / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, directory / "source")
    venv.create(directory / "env", symlinks=True)
    python = directory / "env/bin/python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "-q"]
    site = Path(sysconfig.get_path("purelib", vars={"base": str(directory / "env")}))
    (site / "lock.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", str(directory / "source")], check=True)
    shutil.rmtree(directory / "source")
    return directory / "env/bin"


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A user's folder, with a reward that imports a module beside it, and a config that names it."""
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors/__init__.py").write_text("raise ImportError('not the one')\n")
    (tmp_path / "serve.py").write_text("raise ImportError('not the one')\n")
    (tmp_path / "pipelines").mkdir()  # without `__init__.py`
    (tmp_path / "pipelines/context.py").write_text("raise ImportError('not the one')\n")
    (tmp_path / "words.py").write_text("WANTED = {'goat', 'grass'}\n")
    (tmp_path / "judge.py").write_text(JUDGE)
    config = tiny_config(tmp_path, steps=2) | {"reward": {"type": "program", "function": "judge:score"}}
    return tmp_path, config


def test_an_installed_wheel_does_not_see_the_folders_own(installed: Path, folder: tuple[Path, dict[str, Any]]) -> None:
    code = "import actors, serve.app, plumbline.report.page; print(actors.__file__)"
    seen = subprocess.run([installed / "python", "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert seen.stdout.startswith(str(installed.parent)), "the wheel is what is tried, not the checkout"
    assert_runs(installed, *folder)


def test_a_checkout_does_not_see_the_folders_own(folder: tuple[Path, dict[str, Any]]) -> None:
    directory, config = folder
    assert_runs(Path(sys.executable).parent, directory, config | {"fleet": {"engine": "transformers"}})


def assert_runs(scripts: Path, directory: Path, config: dict[str, Any]) -> None:
    write_config(directory, config)
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
    done = subprocess.run(
        [scripts / "plumbline", "run", "config.yaml", "--run-dir", "run"],
        cwd=directory,
        env=environment | {MARK: str(directory)},
        text=True,
        capture_output=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert "ple 2/2" in done.stdout
    subprocess.run([scripts / "plumbline", "report", "run"], cwd=directory, env=environment, check=True)
    assert (directory / "run/report.html").stat().st_size > 10_000
    assert leftovers(directory) == []
