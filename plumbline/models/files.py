"""A model's files as they lie on a disk, looked at before anything loads them: what kind they are, whether they are
whole, which tensors they say they have, whether the numbers in them are finite. Nothing here imports transformers.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from plumbline.errors import ModelError, in_one_line
from plumbline.submitted import left_out

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_LFS = b"version https://git-lfs"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_ROWS = 2**24
"""Numbers that are looked at at once."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor by its file's header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def model_files(path: str, key: str) -> dict[str, Stored]:
    """The tensors of a transformers model in safetensors, by name.

    Args:
        key: what names the model, in messages.

    Raises:
        ModelError: it is none, or one of its files is not there or damaged.
    """
    directory = Path(path)
    if directory.suffix == ".gguf" and directory.is_file():
        raise ModelError(f"{key}: {path}: a GGUF file; {_NO_GGUF}")
    if not directory.exists():
        hint = left_out(path)
        raise ModelError(
            f"{key}: {path}: no such directory; give a model's directory (config.json, model.safetensors){hint}"
        )
    if (directory / ADAPTER_CONFIG).is_file():  # also beside a config.json: transformers would look for its base
        raise ModelError(f"{key}: {path}: an adapter{_base_of(directory)}, no model; {_remedy(path, key)}")
    if not (directory / CONFIG).is_file():
        raise ModelError(f"{key}: {path}: no model: there is no config.json in it")
    _json(directory / CONFIG, key, "a model's config.json is one")
    if not any(directory.glob("*.safetensors")) and not (directory / INDEX).is_file():
        if any(directory.glob("*.gguf")):
            raise ModelError(f"{key}: {path}: its weights are in GGUF; {_NO_GGUF}")
        raise ModelError(f"{key}: {path}: no *.safetensors in it; save the model with safe_serialization=True")
    return read_headers(_weights(directory, key), key)


def adapter_files(path: str, key: str) -> dict[str, Stored]:
    """The tensors of a PEFT adapter in safetensors, by name.

    Args:
        key: what names the adapter, in messages.

    Raises:
        ModelError: it is none, or one of its files is not there or damaged.
    """
    directory, gives = Path(path), f"give a PEFT adapter's ({ADAPTER_CONFIG}, {ADAPTER_WEIGHTS})"
    if not directory.is_dir():
        raise ModelError(f"{key}: {path}: no such directory; {gives}{left_out(path)}")
    if not (directory / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{key}: {path}: no adapter: there is no {ADAPTER_CONFIG} in it; {gives}")
    _json(directory / ADAPTER_CONFIG, key, "an adapter's is one")
    if not (directory / ADAPTER_WEIGHTS).is_file():
        pickled = " (adapter_model.bin can run code when it is read)" if any(directory.glob("*.bin")) else ""
        raise ModelError(f"{key}: {path}: no {ADAPTER_WEIGHTS} in it{pickled}; save it with safe_serialization=True")
    return read_headers([directory / ADAPTER_WEIGHTS], key)


_NO_GGUF = "give the model that it was made from, in safetensors"


def _remedy(path: str, key: str) -> str:
    """What to do with an adapter where a model should be."""
    if key == "model.path":
        return f"give that as `model.path`, and `model.adapter: {path}`"
    return "merge it into that (PEFT's merge_and_unload), and name what you save then"


def model_type(path: str) -> str:
    """What config.json of a directory that `model_files` let pass says."""
    return str(json.loads((Path(path) / CONFIG).read_text("utf-8")).get("model_type"))


def read_headers(files: Iterable[Path], key: str) -> dict[str, Stored]:
    """The tensors of safetensors files, by name. Raises ModelError where one is damaged."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # no mapping
                    piece = tensors.get_slice(name)
                    found[name] = Stored(file, piece.get_dtype(), tuple(piece.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{key}: {file}: {_damage(file, error)}") from None
    return found


def first_not_finite(stored: Mapping[str, Stored], deadline: float) -> tuple[str | None, int]:
    """The first tensor in which a number is NaN or infinite, and the bytes that were looked at until `deadline`.

    Args:
        deadline: of `time.monotonic`.
    """
    import torch
    from safetensors import safe_open

    seen = 0
    for name, one in stored.items():
        if one.dtype not in _FLOATS or 0 in one.shape:
            continue
        with safe_open(one.file, framework="pt") as tensors:
            piece = tensors.get_slice(name) if one.shape else tensors.get_tensor(name)[None]
            rows, width = (one.shape or (1,))[0], max(1, _numbers(one.shape[1:]))
            step = max(1, _ROWS // width)
            for start in range(0, rows, step):
                if time.monotonic() > deadline:
                    return None, seen
                part = piece[start : start + step]
                if not all(torch.isfinite(end) for end in part.aminmax()):  # either is NaN where any number is
                    return name, seen
                seen += part.nbytes
    return None, seen


def size_of(stored: Mapping[str, Stored]) -> int:
    """Bytes of the tensors that `first_not_finite` looks at."""
    width = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    return sum(_numbers(one.shape) * width[one.dtype] for one in stored.values() if one.dtype in width)


def _numbers(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _weights(directory: Path, key: str) -> Iterator[Path]:
    """The files that transformers reads, in its order of preference. Raises ModelError where there is none."""
    if (directory / WEIGHTS).is_file():
        yield directory / WEIGHTS
        return
    index = directory / INDEX
    if not index.is_file():
        names = ", ".join(sorted(file.name for file in directory.glob("*.safetensors"))[:3])
        raise ModelError(f"{key}: {directory}: neither {WEIGHTS} nor {INDEX} is in it, but {names}; copy the missing")
    named = _json(index, key, "it says which file has which weight; copy it again").get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ModelError(f"{key}: {index}: no `weight_map` in it; copy it again")
    for name in sorted(set(map(str, named.values()))):
        if not (directory / name).is_file():
            raise ModelError(f"{key}: {directory}: {name} is not there, which {INDEX} names; copy it too")
        yield directory / name


def _json(file: Path, key: str, should: str) -> dict[str, object]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError):
        content = None
    if not isinstance(content, dict):
        lfs = "a Git LFS pointer, not the file itself: `git lfs pull`" if _is_pointer(file) else None
        raise ModelError(f"{key}: {file}: {lfs or f'not a JSON object; {should}'}")
    return content


def _damage(file: Path, error: Exception) -> str:
    """What is wrong with a file that safetensors refuses."""
    size = file.stat().st_size if file.exists() else 0
    if isinstance(error, OSError):
        return f"cannot be read ({in_one_line(error)}); copy or save it again"
    if _is_pointer(file):
        return "a Git LFS pointer, not the file itself: `git lfs pull`"
    if size == 0:
        return "it is empty; copy or save it again"
    whole = _whole_size(file)
    if whole is not None and size < whole:
        return f"it was cut: {size} bytes are there of {whole}; copy or save it again"
    return f"no safetensors file, or a damaged one ({error}); copy or save it again"


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(len(_LFS)) == _LFS


def _whole_size(file: Path) -> int | None:
    """Bytes that a safetensors file should have by its header; None where that cannot be read."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if length > 10**8:  # as safetensors has it
            return None
        header = content.read(length)
    if len(header) < length:
        return 8 + length
    try:
        ends = [one["data_offsets"][1] for name, one in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        return None
    return 8 + length + max(ends, default=0)


def _base_of(directory: Path) -> str:
    try:
        base = json.loads((directory / ADAPTER_CONFIG).read_text("utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, OSError):
        base = None
    return f" on {base}" if base else " on some base"
