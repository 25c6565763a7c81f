"""How users reach the policies: the section of a config that says where, who may, how much, and what is promoted; and
what a run and the endpoint beside it know of each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from plumbline.records import TokenGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRun:
    """What the endpoint beside a run is told of it.

    Attributes:
        policies: names of those that users may ask.
        model_path: directory of π0.
        probe: token groups that versions are proved on, within `tolerance` nats.
        store: handle of its policy store, an actor called `store_name`.
    """

    run_dir: Path
    policies: tuple[str, ...]
    model_path: str
    dtype: Literal["float32", "bfloat16", "float16"]
    device: Literal["cpu", "cuda"]
    probe: Sequence[TokenGroup]
    tolerance: float
    chat_template: str
    store: Any
    store_name: str


class RunEndpoint(Protocol):
    """Answers users beside a run. Who starts the run brings one, `serve.live.LiveEndpoint`; pipelines know none."""

    def start(self, run: LiveRun) -> None:
        """Begin; engines load meanwhile. Aliases mean π0 until a version of theirs is promoted."""
        ...

    async def ready(self) -> str:
        """Wait until it answers; returns its address. Raises RunError where it does not come up."""
        ...

    def stop(self) -> str | None:
        """End it, also where it did not start; returns the address that it had."""
        ...
