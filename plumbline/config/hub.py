"""Models of the Hugging Face hub in a config: where a name (`ORG/MODEL`) may stand in place of a directory, and which
commit of it a run has. `plumbline.runs.hub` finds and fetches them; whatever comes after it sees directories.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

Config = Any
"""`plumbline.config.tree`'s, which has sections of this file."""

Kind = Literal["model", "adapter", "tokenizer", "embedder"]
Revision = Annotated[str | None, Field(min_length=1)]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]

_FIXED: Mapping[str, tuple[str, Kind]] = {
    "model.path": ("revision", "model"),
    "model.adapter": ("adapter_revision", "adapter"),
    "model.tokenizer": ("tokenizer_revision", "tokenizer"),
    "embedder.path": ("revision", "embedder"),
}

_NAME = re.compile(r"(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_](?:[\w.-]{0,94}\w)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model by its name; `key` is what names it in messages."""

    key: str
    kind: Kind
    name: str
    revision: str | None

    @property
    def label(self) -> str:
        """The name with its revision, by which `commits` has it."""
        return f"{self.name}@{self.revision}" if self.revision else self.name


def is_hub_name(path: str | None) -> bool:
    """Whether a path may be a model's name; a GGUF file's is none. Those of directories that are there were made
    absolute before."""
    return path is not None and not path.endswith(".gguf") and _NAME.fullmatch(path) is not None


def places(config: Config) -> Mapping[str, tuple[str, Kind]]:
    """Keys that take a name, with the key beside each that says which revision, and what it names."""
    return {**_FIXED, **{f"{key}.path": ("revision", "model") for key in config.rewards}}


def hub_models(config: Config) -> list[HubModel]:
    """Every model that a config has by name."""
    found = []
    for key, (revision, kind) in places(config).items():
        section, path = _at(config, key)
        if is_hub_name(path):
            found.append(HubModel(key, kind, path, getattr(section, revision)))
    return found


def at_directories(config: Config, directories: Mapping[str, str]) -> Config:
    """The config with directories in place of names, by their keys."""
    for key, directory in directories.items():
        *sections, last = key.split(".")
        config = _changed(config, sections, {last: directory, places(config)[key][0]: None})
    return config


def idle_keys(config: Config) -> Iterator[tuple[str, str]]:
    """Revisions of what is no name, and commits of models that the config does not have; with why."""
    for key, (revision, _) in places(config).items():
        section, path = _at(config, key)
        if getattr(section, revision, None) is not None and not is_hub_name(path):
            *sections, last = key.split(".")
            why = f"is of a model of the hub, and `{last}` is no such name (ORG/MODEL); leave it out"
            yield f"{'.'.join(sections)}.{revision}", why
    for label in config.commits.keys() - {one.label for one in hub_models(config)}:
        yield f"commits.{label}", "is of a model that no section names; leave it out"


def _at(config: Config, key: str) -> tuple[Any, Any]:
    """The section that a key of `places` is in, and what it holds; None where there is none."""
    *sections, last = key.split(".")
    node = config
    for name in sections:
        node = _within(node, name)
    return node, getattr(node, last, None)


def _within(node: Any, name: str) -> Any:
    return node[int(name)] if isinstance(node, list) else getattr(node, name, None)


def _changed(node: Any, sections: Sequence[str], changes: Mapping[str, Any]) -> Any:
    if sections:
        first, *rest = sections
        changed = _changed(_within(node, first), rest, changes)
        if isinstance(node, list):
            return [changed if i == int(first) else one for i, one in enumerate(node)]
        changes = {first: changed}
    return node.model_copy(update=changes)
