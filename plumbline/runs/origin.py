"""Which code and which packages a run was started with, and again when it was resumed: what it takes to make it anew.

`pipelines.run` has it written before anything starts; `plumbline report` shows it.
"""

import json
import re
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from plumbline.errors import DataError
from plumbline.runs.disk import write_text

FILE = "origin.json"
HOME = Path(__file__).resolve().parents[2]
"""Of the checkout, where the code is run from one."""
GIT_S = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """`code` is a commit, or the package's version where there is none; `lock` the file of locks/ that is installed,
    with its SHA-256, "" where what is installed is none of them; `packages` the SHA-256 of all that is installed;
    `model` of which GGUF file the base model was made, "" where it was of none."""

    code: str
    lock: str
    packages: str
    model: str = ""


def origin(home: Path = HOME, model: str = "") -> Origin:
    """Of this process. To be called before Ray starts, under which a driver does not hear how its children end."""
    places = sorted({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})  # Ray adds others as it is imported
    installed = {_name(one.metadata["Name"]): one.version for one in metadata.distributions(path=places)}
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(installed.items()))
    return Origin(
        code=_code(home), lock=_lock(home, installed), packages=sha256(lines.encode()).hexdigest(), model=model
    )


def keep_origin(run_dir: Path, model: str = "") -> Path:
    """Add this process's to the run's file, where the last one there is another. Raises DataError, DiskError."""
    before, now = read_origins(run_dir), origin(model=model)
    if before[-1:] != [now]:
        write_text(run_dir / FILE, json.dumps([asdict(one) for one in [*before, now]], indent=1))
    return run_dir / FILE


def read_origins(run_dir: Path) -> list[Origin]:
    """What a run was started and resumed with, in that order; empty where it kept none. Raises DataError."""
    path = run_dir / FILE
    if not path.exists():
        return []
    try:
        return [Origin(**{key: str(value) for key, value in one.items()}) for one in json.loads(path.read_bytes())]
    except (ValueError, TypeError, AttributeError):
        raise DataError(f"{path}: no list of origins; remove it, and it is begun anew") from None


def _code(home: Path) -> str:
    tracked = _git(home, "ls-files", "--error-unmatch", "plumbline/__init__.py")  # or the checkout is somebody else's
    if tracked and (commit := _git(home, "rev-parse", "HEAD")):
        return f"commit {commit}" + (", changed since" if _git(home, "status", "--porcelain", "-uno") else "")
    try:
        return f"plumbline {metadata.version('plumbline')}"
    except metadata.PackageNotFoundError:
        return "unknown"


def _git(home: Path, *arguments: str) -> str:
    """What it prints; nothing where it fails or is not there."""
    try:
        ran = subprocess.run(["git", "-C", str(home), *arguments], capture_output=True, text=True, timeout=GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def _lock(home: Path, installed: Mapping[str, str]) -> str:
    for file in sorted((home / "locks").glob("*.txt")):
        text = file.read_bytes()
        pins = re.findall(r"^([\w.-]+)(?:\[[^\]]*\])?==([^\s;]+)", text.decode("utf-8"), re.MULTILINE)
        if pins and all(installed.get(_name(name)) == version for name, version in pins):
            return f"{file.name} {sha256(text).hexdigest()}"
    return ""


def _name(name: str) -> str:
    """As package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()
