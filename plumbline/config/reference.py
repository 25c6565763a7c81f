"""docs/configuration.md, written from `plumbline.config.tree`: only EXAMPLE and HEAD are kept by hand.

    python -m plumbline.config.reference            writes the page
    python -m plumbline.config.reference --check    fails where the page is not what the config gives; writes nothing

`make check` and tests/unit/config/test_reference.py call it. The page follows the JSON schema: one of its sections for
each section of a config, in the order of the tree, and only one where several keys take the same section.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plumbline.config.tree import Config

Schema = Mapping[str, Any]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
COMMAND = "python -m plumbline.config.reference"

EXAMPLE = """\
name: polite                                # the run goes to runs/polite
seed: 0
model: {path: /models/base, max_len: 1024}
data:
  train: {path: prompts.jsonl, columns: {prompt: question, target: answer}}
  heldout: {path: heldout.jsonl}
  max_prompt_tokens: 256
reward: {type: classifier, path: /models/reward}
embedder: {path: /models/sentence-embedder}
sft: {epochs: 1, learner: {lr: 5.0e-6, batch_size: 128}}
pipelines:
  - type: ple
    principle: harmless
    replay_window: 1
    generation: {max_tokens: 512}
    learner: {lr: 2.0e-4, schedule: cosine}
  - type: dlma
    contrast: {preset: harmless}
    generation: {max_tokens: 512}
    learner: {lr: 2.0e-5, warmup: 150}
  - type: self_contrast
    samples: 32
    keep: 0.25
    negatives: 8
    generation: {max_tokens: 512}
    learner: {lr: 2.0e-5}
evaluation:
  prompts: 512
  judge: {type: classifier, path: /models/judge}
serve:                                      # users are answered while it trains
  enabled: true
  gate: {every: 4, prompts: 64}
tracking: {mlflow: {uri: http://mlflow:5000}} # beside TensorBoard
storage_path: s3://bucket/runs              # the run is also kept in s3://bucket/runs/polite
"""
"""A config with every common section; a test loads it."""

METHODS = {"1": "1-dlma", "2": "2-self-contrast", "3": "3-ple"}
"""Anchors in docs/methods.md of the sections that docstrings name."""

HEAD = f"""\
# Configuration

A run is one YAML file: `plumbline run CONFIG`. This page is written from the code by `{COMMAND}`,
and `make check` fails where the two differ. For instance:

```yaml
{EXAMPLE}```

A default of `none` means that the key may be left out, or be `null`; a default of `{{}}` is a section with all of its
own defaults. `pipelines[]` is any item of the list `pipelines`. A section that comes in several kinds says by its
`type` which one it is.

`plumbline run` and `plumbline doctor` refuse unknown keys and values out of bounds before anything starts. `--set`
changes a key for one run, by its dotted name and a YAML value: `--set pipelines.0.learner.lr=1e-4`. Local paths are
taken from the working directory.

A model is a directory, or a name of the Hugging Face hub (`ORG/MODEL`, with `revision` beside it) where no directory
is called so. What lies in the hub's cache (`HF_HOME`) is used from there; anything else is downloaded before the run
starts: safetensors, tokenizer and configs alone. The commit is kept in the run's config.yaml (`commits`), and
`resume`, `serve`, `evaluate` and `export` have that very one, wherever the branch has moved.
"""


def page(schema: Schema) -> str:
    """The whole page for the JSON schema of a config.

    Raises:
        ValueError: two sections would have one heading.
    """
    sections = schema["$defs"]
    places: dict[str, list[Place]] = {}
    for name, place in _places(schema, sections, ""):
        if place not in places.setdefault(name, []):
            places[name].append(place)
    titles = {name: _title(name, there) for name, there in places.items()}
    if twice := [title for title in titles.values() if list(titles.values()).count(title) > 1]:
        raise ValueError(f"two sections of the config would be headed {twice[0]}; give one of them another name")
    parts = [HEAD, "## Top level\n", _table(schema, sections, titles)]
    for name, there in places.items():
        parts += [f"## {titles[name]}\n", f"{_prose(sections[name])}{_where(titles[name], there)}\n"]
        parts.append(_table(sections[name], sections, titles, chosen=all(place.tag for place in there)))
    return "\n".join(parts)


def anchor(heading: str) -> str:
    """What GitHub makes of a heading in links: lower case, `-` for spaces, no other punctuation than `-` and `_`."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@dataclass(frozen=True, slots=True)
class Place:
    """A key that takes a section, and the `type` that chooses it among several kinds."""

    path: str
    tag: str | None


def _places(section: Schema, sections: Mapping[str, Schema], path: str) -> Iterator[tuple[str, Place]]:
    """Name and place of every section below one, depth first."""
    for key, value in section["properties"].items():
        for name, tag, mark in _refs(value):
            inner = f"{path}{key}{mark}"
            yield name, Place(inner, tag)
            yield from _places(sections[name], sections, f"{inner}.")


def _refs(value: Schema, mark: str = "") -> Iterator[tuple[str, str | None, str]]:
    """Sections that a value may be: name, the `type` that chooses it, and what its path has after the key."""
    tags = {ref: tag for tag, ref in value.get("discriminator", {}).get("mapping", {}).items()}
    if "$ref" in value:
        yield _name(value["$ref"]), None, mark
    for one in (*value.get("anyOf", ()), *value.get("oneOf", ())):
        for name, tag, below in _refs(one, mark):
            yield name, tag or tags.get(one.get("$ref")), below
    for key, below in (("items", "[]"), ("additionalProperties", ".NAME")):
        if isinstance(inner := value.get(key), Mapping):
            yield from _refs(inner, mark + below)


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _title(name: str, places: Sequence[Place]) -> str:
    """The shortest heading that says which section it is: its `type`, its key, or its name in the code."""
    tags = {place.tag for place in places if place.tag}
    keys = {place.path.rpartition(".")[2] for place in places}
    if tags:
        return f"`type: {tags.pop()}`"
    if len(places) == 1:
        return f"`{places[0].path}`"
    return f"`{keys.pop()}`" if len(keys) == 1 else name


def _where(title: str, places: Sequence[Place]) -> str:
    """A sentence for a section whose heading does not say where it stands."""
    told = [f"`{place.path}`" for place in places]
    return "" if told == [title] else f"\n\nStands at {_listed(told, 'and')}."


def _table(section: Schema, sections: Mapping[str, Schema], titles: Mapping[str, str], chosen: bool = False) -> str:
    """A row a key: its type with bounds, its default, what it is. `chosen`: its `type` must always be written."""
    rows = ["| key | type | default | what it is |", "|---|---|---|---|"]
    properties = section["properties"]
    required = {*section.get("required", ()), *(["type"] if chosen else [])}
    for key in sorted(properties, key=lambda key: key != "type"):  # `type` first, the others as they are
        value = properties[key]
        default = "required" if key in required else _default(value, sections)
        cells = (f"`{key}`", _type(value, titles), default, _meaning(key, value, sections))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _type(value: Schema, titles: Mapping[str, str]) -> str:
    """A value's type in words, with its bounds."""
    if "$ref" in value:
        title = titles[_name(value["$ref"])]
        return f"[{title}](#{anchor(title)})"
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return _listed([f"`{one}`" for one in value["enum"]], "or")
    if kinds := [*value.get("anyOf", ()), *value.get("oneOf", ())]:
        return _listed([_type(one, titles) for one in kinds if one.get("type") != "null"], "or")
    kind = value.get("type")
    if kind == "array" and "prefixItems" in value:
        return f"[{', '.join(_type(one, titles) for one in value['prefixItems'])}]"
    if kind == "array":
        least = f", at least {value['minItems']}," if "minItems" in value else ""
        return f"list{least} of {_type(value.get('items', {}), titles)}"
    if kind == "object":
        values = value.get("additionalProperties")
        return f"mapping of names to {_type(values, titles)}" if isinstance(values, Mapping) else "mapping"
    return {"string": "text", None: "any value"}.get(kind, str(kind)) + _bounds(value)


def _bounds(value: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    told = ",".join(f" {sign} {_yaml(value[bound])}" for bound, sign in signs.items() if bound in value)
    if "pattern" in value:
        told += f" like `{value['pattern']}`"
    if "maxLength" in value:
        told += f", at most {value['maxLength']} characters"
    return told


def _listed(words: Sequence[str], last: str) -> str:
    """ "a", "a or b", "a, b or c"."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _default(value: Schema, sections: Mapping[str, Schema]) -> str:
    """A default as a config would have it; of a section, only what differs from its own defaults."""
    default = value.get("default")
    if default is None:
        return "none"
    for name, tag, _ in _refs(value) if isinstance(default, Mapping) else ():
        if tag in (None, default.get("type")):
            own = sections[name]["properties"]
            default = {k: v for k, v in default.items() if k == "type" or v != own[k].get("default")}
    return f"`{_yaml(default)}`"


def _yaml(value: object) -> str:
    """A value on one line, as a config would have it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, int | float) else str(value)


def _meaning(key: str, value: Schema, sections: Mapping[str, Schema]) -> str:
    """A key's description; of a key that takes a section, the first sentence of what that says of itself."""
    if text := value.get("description"):
        return _linked(text)
    names = [name for name, _, _ in _refs(value)]
    if len(names) == 1:
        return re.split(r"(?<=\.)\s", _prose(sections[names[0]]))[0]
    return "one of these, by its `type`" if names else "which kind of section this is" if key == "type" else ""


def _prose(section: Schema) -> str:
    """A section's docstring as Markdown."""
    return _linked(section.get("description", "").replace("``", "`"))


def _linked(text: str) -> str:
    """What the code calls a section of METHODS.md is a link to that of docs/methods.md."""
    return re.sub(r"METHODS\.md §(\d)", lambda found: f"[methods](methods.md#{METHODS[found[1]]})", text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, or only compare it."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Write docs/configuration.md from the code.")
    parser.add_argument("--check", action="store_true", help="fail where the page is not up to date; write nothing")
    options = parser.parse_args(arguments)
    text = page(Config.model_json_schema())
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text("utf-8") != text:
        sys.exit(f"docs/configuration.md is not what plumbline/config gives; write it by: {COMMAND}")


if __name__ == "__main__":
    main()
