"""docs/configuration.md is what the code gives, every key is described, and the schema is told as it is."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from plumbline.config import reference
from plumbline.config.file import parse_config
from plumbline.config.reference import COMMAND, EXAMPLE, PAGE, anchor, main, page
from plumbline.config.section import Count, Section, Share
from plumbline.config.tree import Config


class Disk(Section):
    """A place of ``files``. Slow."""

    type: Literal["disk"]
    path: str = Field(pattern="^a|b$", description="where | it lies")


class Cloud(Section):
    """A place elsewhere (METHODS.md §2)."""

    type: Literal["cloud"] = "cloud"
    names: dict[str, int] = Field(default={})


class Inner(Section):
    """What is inside. And more."""

    share: Share = 0.5
    width: int | None = Field(default=None, ge=2, lt=9)


class Outer(Section):
    """A tree with one of everything."""

    count: Count
    inner: Inner = Inner(width=3)
    others: list[Inner] = Field(default=[], max_length=3)
    place: Annotated[Disk | Cloud, Field(discriminator="type")] | None = None
    range: tuple[float, float] = (-1.0, 0.25)
    workers: Count | tuple[Count, Count] = 1


@pytest.fixture(scope="module")
def told() -> str:
    return page(Outer.model_json_schema())


@pytest.mark.parametrize(
    "row",
    [
        "| `count` | integer ≥ 1 | required |  |",
        "| `inner` | [Inner](#inner) | `{width: 3}` | What is inside. |",
        "| `share` | number > 0, ≤ 1 | `0.5` |  |",
        "| `width` | integer ≥ 2, < 9 | none |  |",
        "| `others` | list of [Inner](#inner) | `[]` | What is inside. |",
        "| `place` | [`type: disk`](#type-disk) or [`type: cloud`](#type-cloud) | none | one of these, by its `type` |",
        "| `path` | text like `^a\\|b$` | required | where \\| it lies |",
        "| `type` | `cloud` | required | which kind of section this is |",
        "| `names` | mapping of names to integer | `{}` |  |",
        "| `range` | [number, number] | `[-1, 0.25]` |  |",
        "| `workers` | integer ≥ 1 or [integer ≥ 1, integer ≥ 1] | `1` |  |",
    ],
)
def test_a_key_is_told_with_type_bounds_default_and_meaning(told: str, row: str) -> None:
    assert row in told.splitlines()


def test_a_section_is_told_once_with_all_its_places(told: str) -> None:
    headings = [line for line in told.splitlines() if line.startswith("## ")]
    assert headings == ["## Top level", "## Inner", "## `type: disk`", "## `type: cloud`"]
    assert "Stands at `inner` and `others[]`." in told
    assert "A place of `files`. Slow.\n\nStands at `place`." in told


def test_sections_of_the_methods_are_linked(told: str) -> None:
    assert "A place elsewhere ([methods](methods.md#2-self-contrast))." in told


class Floppy(Section):
    """Another disk."""

    type: Literal["disk"]


class Two(Section):
    """Two unions with a kind of the same name."""

    one: Annotated[Disk | Cloud, Field(discriminator="type")]
    other: Annotated[Floppy | Cloud, Field(discriminator="type")]


def test_two_sections_of_one_heading_are_refused() -> None:
    with pytest.raises(ValueError, match="two sections of the config would be headed `type: disk`"):
        page(Two.model_json_schema())


def test_every_key_is_described() -> None:
    schema = Config.model_json_schema()
    told = [line.split(" | ") for line in page(schema).splitlines() if line.startswith("| `")]
    assert len(told) > 100
    assert not [cells[0] for cells in told if cells[-1].strip("| ") == ""], "give these a `description`"


def test_the_example_is_a_config() -> None:
    config = parse_config(yaml.safe_load(EXAMPLE), origin="the example")
    assert [one.type for one in config.pipelines] == ["ple", "dlma", "self_contrast"]


def test_the_page_is_what_the_code_gives() -> None:
    """The text is compared, not the outcome of --check: pytest then shows where they differ."""
    assert PAGE.read_text("utf-8") == page(Config.model_json_schema()), f"write it by: {COMMAND}"


def test_check_fails_on_another_page_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "PAGE", tmp_path / "configuration.md")
    with pytest.raises(SystemExit, match=f"write it by: {COMMAND}"):
        main(["--check"])
    assert not reference.PAGE.exists()
    main([])
    main(["--check"])
    reference.PAGE.write_text("# Configuration\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=f"write it by: {COMMAND}"):
        main(["--check"])
    assert reference.PAGE.read_text("utf-8") == "# Configuration\n"


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("Settings that collapse", "settings-that-collapse"),
        ("`type: self_contrast`", "type-self_contrast"),
        ("`fleet.generator`", "fleetgenerator"),
        ("Where this differs, and why", "where-this-differs-and-why"),
        ("DPO against TRL: 3×", "dpo-against-trl-3"),
    ],
)
def test_anchors_are_those_of_github(heading: str, expected: str) -> None:
    assert anchor(heading) == expected
