"""What every section of a config is made of. Used by `plumbline.config.tree` and `plumbline.config.fleet`."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64, description="what its directory and figures are called"
    ),
]


def _by_name(resources: dict[str, float]) -> dict[str, float]:
    reserved = {"CPU", "GPU", "memory", "object_store_memory"}
    for name in resources:
        if name in reserved or not re.fullmatch(r"[A-Za-z][\w.:-]*", name):
            raise ValueError(
                f"{name!r} is no resource by name, such as generator; cpus and gpus have keys of their own"
            )
    return resources


Resources = Annotated[
    dict[str, Annotated[float, Field(ge=0.0001, le=10_000)]],
    AfterValidator(_by_name),
    Field(description="Ray resources by name, such as {generator: 1}: it lands on nodes that offer them"),
]


def _in_order(value: Any) -> Any:
    """One line for what is neither a count nor bounds: see `_gpus`."""
    pair = list(value) if isinstance(value, list | tuple) else [value, value]
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in pair)
    if not whole or len(pair) != 2 or not 0 <= pair[0] <= pair[1] or pair[1] < 1:
        given = f", got {value}" if isinstance(value, list) else ""
        raise ValueError(f"should be a count of 1 or more, or its bounds, such as [1, 4]{given}")
    return tuple(pair) if isinstance(value, list) else value


Auto = Literal["auto"]
"""`plumbline.placement` puts a number in its place before anything is started."""
T = TypeVar("T")


def _gpus(value: Any) -> Any:
    """One line for what is no such number: a union's own errors name its kinds, which no config has."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != "auto" and not (number and value >= 0 and (value < 1 or value == int(value))):
        raise ValueError("should be auto, a share of one below 1, or a whole number")
    return value


def _whole(least: int) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value != "auto" and not (isinstance(value, int) and not isinstance(value, bool) and value >= least):
            raise ValueError(f"should be auto, or a whole number of {least} or more")
        return value

    return BeforeValidator(check)


def _share(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != "auto" and not (number and 0 < value <= 1):
        raise ValueError("should be auto, or a share above 0 and at most 1")
    return value


Gpus = Annotated[Annotated[float, Field(ge=0)] | Auto, BeforeValidator(_gpus)]
Cpus = Annotated[Count | Auto, _whole(1)]
Tokens = Annotated[Count | Auto, _whole(1)]
MaxLen = Annotated[Annotated[int, Field(ge=16)] | Auto, _whole(16)]
MemoryShare = Annotated[Share | Auto, BeforeValidator(_share)]


def planned(value: T | Auto) -> T:
    """A number that is `auto` no more. What starts and counts processes reads a config after `plumbline.placement`."""
    assert value != "auto", "a config that was not placed"
    return value  # pyright: ignore[reportReturnType]


Elastic = Annotated[Count | tuple[Annotated[int, Field(ge=0)], Count], BeforeValidator(_in_order)]
"""How many there are, 1 or more; or the bounds between which that changes, of which the lower may be 0."""
AutoElastic = Annotated[
    Count | tuple[Annotated[int, Field(ge=0)], Count] | Auto,
    BeforeValidator(lambda value: value if value == "auto" else _in_order(value)),
]


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(value, default=str))
    except (TypeError, ValueError, RecursionError):
        raise ValueError("should hold texts, numbers, lists and mappings alone") from None


Json = Annotated[dict[str, Any], AfterValidator(_as_json)]
"""A mapping that is handed on, as a run's config.yaml keeps it: what YAML reads as a number may be no key there."""

LARGEST = 2**53
"""Of a number in a config: beyond it not every integer is a float of its own, and none is meant."""


def out_of_reach(node: Any, largest: float = LARGEST, key: str = "") -> Iterator[tuple[str, float]]:
    """NaN and numbers beyond `largest` in a tree of mappings and lists, with their places: `fleet.generator.gpus`."""
    if isinstance(node, int | float) and not abs(node) <= largest:
        yield key, node
    elif isinstance(node, Mapping | list):
        for name, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from out_of_reach(value, largest, f"{key}.{name}" if key else str(name))


def replaced(node: Any, key: Sequence[str | int], values: Mapping[str, Any]) -> Any:
    """A copy of a tree of sections with some values of the section at `key` replaced."""
    if not key:
        return node.model_copy(update=dict(values))
    first, *rest = key
    if isinstance(first, int):
        return [replaced(one, rest, values) if i == first else one for i, one in enumerate(node)]
    return node.model_copy(update={first: replaced(getattr(node, first), rest, values)})


def bounds(count: int | tuple[int, int]) -> tuple[int, int]:
    """Least and most of an `Elastic`; a fixed number is both."""
    return count if isinstance(count, tuple) else (count, count)


class Section(BaseModel):
    """Base of all sections: no unknown keys, no numbers that are not finite, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
