"""Config files: one YAML file to a checked `Config`, and back. Called by the command line and the run directory.

Unknown keys, wrong types and values out of bounds are refused with one line that names the file, the key and what would
be right. Local paths are taken from the working directory and kept absolute, so that a run resumes from anywhere.
"""

import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from plumbline.config.section import LARGEST, out_of_reach
from plumbline.config.tree import Config
from plumbline.errors import ConfigError
from plumbline.submitted import left_out

LOCAL_PATHS = {"path", "adapter", "tokenizer", "chat_template", "cache"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply ``key.sub=value`` overrides (values are YAML), check everything.

    Raises:
        ConfigError: one line naming the file, the key, what is wrong and what would be right.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: no such file; name a YAML config, such as configs/quickstart.yaml{left_out(path)}"
        ) from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{file}: not a text file ({error}); a config is YAML in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); make it readable") from None
    return parse_text(text, str(file), overrides)


def parse_text(text: str, origin: str, overrides: Sequence[str] = ()) -> Config:
    """Check the YAML of a config; `origin` is what messages call it. Raises ConfigError."""
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the latter two of dates, numbers and depths
        raise ConfigError(f"{origin}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: a config is a mapping of keys, this is {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return parse_config(tree, origin)


def parse_config(tree: Mapping[str, Any], origin: str) -> Config:
    """Check a tree that is already in memory; `origin` is what messages call it. Raises ConfigError."""
    for key, number in out_of_reach(tree):  # sections have bounds, but not all that they hold is theirs to know
        finite = isinstance(number, int) or math.isfinite(number)
        should = f"a number within ±{LARGEST}" if finite else "a finite number"
        raise ConfigError(f"{origin}: {_printable(key)}: should be {should}, got {number!s:.30}")
    commits = tree.get("commits")
    # Of a run that has begun: a directory that only looks like the name must not take the model's place.
    names = {str(one).partition("@")[0] for one in commits} if isinstance(commits, Mapping) else ()
    try:
        return Config.model_validate(
            _change_paths(tree, lambda key, value: value if value in names else _absolute(key, value))
        )
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_printable(_explain(error))}") from None


def _printable(text: str) -> str:
    """A key may hold whatever YAML can write: a line break in it must not make two lines of one."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def dump_config(config: Config, within: Path | None = None, *, brief: bool = False) -> str:
    """YAML that `load_config` reads back to an equal config.

    Args:
        within: local paths in this directory are written relative to it, to be read in another one.
        brief: only what was given, without the defaults.
    """
    tree = config.model_dump(mode="json", exclude_none=True, exclude_unset=brief)
    if within is not None:
        tree = _change_paths(tree, lambda key, value: _relative(value, within) if key in LOCAL_PATHS else value)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write KEY=VALUE, such as --set fleet.generator.replicas=2")
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        node = node[_index(node, part, override)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: {part} holds a value, not a section")
    place: Any = _index(node, last, override) if isinstance(node, list) else last
    try:
        node[place] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"--set {override}: {value!r} is no YAML value; quote text that holds : [ {{ or #") from None


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"--set {override}: {part!r} is no position in a list of {len(items)}; write 0, 1, …")
    return int(part)


def _absolute(key: str, value: str) -> str:
    """Local paths made absolute; names that are no local path (a dataset's, a model's, `chatml`, a URL) stay."""
    if key == "storage_path" and value and (value.startswith("file://") or "://" not in value):
        return str(Path(value.removeprefix("file://")).expanduser().resolve())
    if key in LOCAL_PATHS and (value.startswith((".", "~")) or os.path.exists(value)):
        return str(Path(value).expanduser().resolve())
    return value


def _relative(path: str, within: Path) -> str:
    inside = Path(path).is_absolute() and Path(path).is_relative_to(within)
    return f"./{Path(path).relative_to(within).as_posix()}" if inside else path


def _change_paths(node: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """A tree with ``change(key, value)`` in place of every string."""
    if isinstance(node, Mapping):
        return {k: _change_paths(v, change, k) for k, v in node.items()}
    if isinstance(node, list):
        return [_change_paths(v, change) for v in node]
    return change(key, node) if isinstance(node, str) else node


def _explain(error: ValidationError) -> str:
    """The first problem of a validation, as one line."""
    problem = next(
        (e for e in error.errors() if e["type"] == "extra_forbidden"), error.errors()[0]
    )  # a misspelt key also makes the right one "missing": name the misspelling
    location, _ = _walk(problem["loc"])
    key = ".".join(map(str, location)) or "config"
    if problem["type"] == "extra_forbidden":
        _, sections = _walk(problem["loc"][:-1])
        known = [name for section in sections for name in section.model_fields]
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        return f"{key}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
    if problem["type"] == "missing":
        return f"{key}: missing; this key is required"
    if problem["type"] == "union_tag_invalid":
        context = problem.get("ctx", {})
        return f"{key}.type: {context.get('tag')!r} is unknown; known are {context.get('expected_tags')}"
    if problem["type"] == "union_tag_not_found":
        return f"{key}.type: missing; say which kind this is"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "should be a mapping of keys"
    given = problem["input"]
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{key}: {message[0].lower()}{message[1:]}{shown}"


def _walk(location: Sequence[int | str]) -> tuple[list[int | str], list[type[BaseModel]]]:
    """A location without the union tags that pydantic puts into it (pipelines.0.ple.steps), and the sections there."""
    kept: list[int | str] = []
    here: list[type[BaseModel]] = [Config]
    for part in location:
        tagged = [s for s in here if len(here) > 1 and part in get_args(s.model_fields["type"].annotation)]
        if tagged:
            here = tagged
            continue
        kept.append(part)
        if isinstance(part, str):
            here = [t for s in here if part in s.model_fields for t in _sections(s.model_fields[part].annotation)]
    return kept, here


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
