"""Shipped configs with anything wrong in them: valid, or refused in one line that names a key.

PLUMBLINE_EXAMPLES=1000 looks longer.
"""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plumbline.config.file import dump_config, parse_config, parse_text
from plumbline.errors import ConfigError

EXAMPLES = int(os.environ.get("PLUMBLINE_EXAMPLES", "25"))
SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
CONFIGS = Path(__file__).resolve().parents[3] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
TREES = {path.relative_to(CONFIGS).as_posix(): yaml.safe_load(path.read_text("utf-8")) for path in FILES}
TEXT = st.text() | st.sampled_from(["auto", "", "\x00", "inf", "1e999", "../x", "lora", "{}", "ple"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**63, 10**400, float("inf"), float("nan")])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.integers() | st.none(), inner, max_size=3),
    max_leaves=5,
)


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (mapping or list, key) of a tree."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, dict | list):
            yield from places(value)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    tree = copy.deepcopy(TREES[draw(st.sampled_from(sorted(TREES)))])
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            break
        node, key = draw(st.sampled_from(found))
        kind = draw(st.sampled_from(["value", "drop", "rename", "swap"]))
        if kind == "drop":
            del node[key]
        elif kind == "rename" and isinstance(node, dict):
            node[draw(TEXT | st.sampled_from(["max_len", "steps", "share", "pairs", "train", "keep"]))] = node.pop(key)
        elif kind == "swap":
            other, at = draw(st.sampled_from(found))
            node[key] = copy.deepcopy(
                other.get(at) if isinstance(other, dict) else other[at] if at < len(other) else None
            )
        else:
            node[key] = draw(VALUES)
    return tree


def told(error: ConfigError) -> None:
    message = str(error)
    assert message.startswith("x.yaml: ") and message.count(": ") >= 2 and "\n" not in message, message
    message.encode()


@settings(
    max_examples=EXAMPLES,
    deadline=5000,
    derandomize=True,
    suppress_health_check=SLOW,
)
@given(tree=mutated())
def test_a_tree_that_is_another(tree: dict[str, Any]) -> None:
    try:
        config = parse_config(tree, "x.yaml")
    except ConfigError as error:
        told(error)
    else:
        assert parse_text(dump_config(config), "kept") == config, "what a run keeps is not what was given"


@settings(
    max_examples=EXAMPLES,
    deadline=5000,
    derandomize=True,
    suppress_health_check=SLOW,
)
@given(name=st.sampled_from(sorted(TREES)), at=st.floats(0, 1), cut=st.integers(0, 9), put=TEXT)
def test_a_text_that_is_another(name: str, at: float, cut: int, put: str) -> None:
    text = (CONFIGS / name).read_text("utf-8")
    start = int(at * len(text))
    try:
        parse_text(text[:start] + put + text[start + cut :], "x.yaml")
    except ConfigError as error:
        assert str(error).startswith("x.yaml: ") and "\n" not in str(error)


def test_a_number_under_a_key_of_two_lines_is_told_in_one() -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config({"name": {"a\nb": float("nan")}}, "x.yaml")
    told(raised.value)
    assert "name.a\\nb: should be a finite number" in str(raised.value)


def test_what_a_mapping_hands_on_is_kept_as_json_has_it() -> None:
    tree = TREES["comments-judge.yaml"]
    tree = {**tree, "model": {**tree["model"], "init": {**tree["model"]["init"], "id2label": {0: "bad", 1: "good"}}}}
    kept = parse_config(tree, "x.yaml")
    assert kept.model.init and kept.model.init["id2label"] == {"0": "bad", "1": "good"}
    assert parse_text(dump_config(kept), "kept") == kept


def test_a_path_that_no_disk_can_have_is_left_to_who_opens_it() -> None:
    """`Path.exists` raises on a name that is too long."""
    tree = copy.deepcopy(TREES["quickstart.yaml"])
    tree["model"]["path"] = "a" * 5000
    assert parse_config(tree, "x.yaml").model.path == "a" * 5000
