"""What every pipeline of a run shares: the config, the directory, the tokenizer, the fleet, the pool, the event log."""

import asyncio
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from actors.learning.frozen import FrozenSpec
from actors.learning.worker import LearnerSpec
from actors.proof import tolerance_of
from actors.spawn import Fleet
from pipelines.pool import Pool
from plumbline.config.learner import FullPolicy
from plumbline.config.pipelines import Pipeline, Preference
from plumbline.config.tree import Config
from plumbline.records import PolicyRef, TokenGroup
from plumbline.runs.disk import append_line, write_text
from plumbline.runs.endpoint import LiveRun
from plumbline.runs.rows import Rows
from plumbline.runs.storage import Storage
from plumbline.tracking.feed import Trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Event = Mapping[str, Any]


class EventLog:
    """`events.jsonl`: one line a step; every event also goes to `listen`, which shows it, and to the trackers.

    A last line without its end is of a process that was killed while it wrote, and is dropped.
    """

    def __init__(self, path: Path, listen: Callable[[Event], None], trackers: Trackers | None = None) -> None:
        self._path = path
        self._listen = listen
        self._trackers = trackers or Trackers([])

    def keep(self, pipeline: str, done: int) -> int:
        """Drop a pipeline's lines of steps after `done`, which will be done again; returns the last step that stays."""
        text = self._path.read_text("utf-8") if self._path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
        kept = [e for e in lines if e.get("pipeline") != pipeline or e.get("step", 0) <= done]
        write_text(self._path, "".join(json.dumps(e) + "\n" for e in kept))
        last = max((e["step"] for e in kept if e.get("pipeline") == pipeline and "step" in e), default=0)
        self._trackers.rewind(pipeline, last)
        return last

    def write(self, event: Event) -> None:
        """Add a line and show it. What is no finite number, such as a drift that drowned in noise, becomes null."""
        event = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
        append_line(self._path, json.dumps({"time": time.time(), **event}))
        self._listen(event)
        self._trackers(event)

    def say(self, message: str) -> None:
        """Show a line without logging it."""
        self._listen({"message": message})


class Promoter(Protocol):
    """Decides which proved versions users get; `pipelines.gate.Gatekeeper` where the run has an endpoint."""

    def offer(self, ref: PolicyRef, *, last: bool) -> None:
        """A version was proved by all generators; `last`: of its run. Returns at once."""
        ...

    def looks_at(self, policy: str) -> set[int]:
        """Versions of a policy that were offered and are not decided yet."""
        ...

    async def finish(self) -> None:
        """Wait for what is still being looked at."""
        ...


@dataclass(slots=True, kw_only=True)
class Context:
    """One run. `model_path` is π0's directory: the config's model, or what the `sft` section made of it.

    `fingerprint` says which model that is, where pairs are made or trained on; `frozen` is what learners answer for it
    with, where they do. Tasks in `beside` end with the run.
    """

    config: Config
    run_dir: Path
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    tokenizer: "PreTrainedTokenizerBase"
    rows: Rows
    events: EventLog
    fleet: Fleet
    storage: Storage = field(default_factory=lambda: Storage(Path(), None))
    probe: tuple[TokenGroup, ...] = ()
    model_path: str = ""
    fingerprint: str = ""
    frozen: FrozenSpec | None = None
    pool: Pool = field(default_factory=lambda: Pool([], 0))
    beside: list["asyncio.Task[None]"] = field(default_factory=list)
    promoter: Promoter | None = None
    _turns: Iterator[int] = field(default_factory=itertools.count)

    @property
    def tolerance(self) -> float:
        """Nats a token that an engine's probe may differ from the learner's."""
        return tolerance_of(self.config, self.dtype)

    def pick(self, replicas: Sequence[Any]) -> Any:
        """One of an actor's replicas, each in turn."""
        return replicas[next(self._turns) % len(replicas)]

    def reference(self, pipeline: str) -> Any:
        """Whom a pipeline asks what π0 says: its own learner, or a copy of π0."""
        return self.fleet.desks.get(pipeline) or self.pick(self.fleet.reference)

    def live_run(self) -> LiveRun:
        """What an endpoint beside the run is told of it."""
        return LiveRun(
            run_dir=self.run_dir,
            policies=tuple(p.name for p in self.config.served),
            model_path=self.model_path,
            dtype=self.dtype,
            device=self.device,
            probe=self.probe,
            tolerance=self.tolerance,
            chat_template=self.tokenizer.get_chat_template(),
            store=self.fleet.store,
            store_name=self.fleet.store_name,
        )

    async def close(self) -> None:
        """End what runs beside the pipelines, and stop every actor."""
        for task in self.beside:
            task.cancel()
        await asyncio.gather(*self.beside, return_exceptions=True)
        self.fleet.close()

    def learner_spec(self, section: Pipeline, total: int, *, serves: bool) -> LearnerSpec:
        """A learner that starts from π0, or from the config's model where π0 is yet to be made.

        Args:
            serves: its versions go to generators; else there is one model at the end.
        """
        whole = isinstance(getattr(section, "policy", None), FullPolicy)
        model = self.config.model.at(self.model_path) if self.model_path else self.config.model
        return LearnerSpec(
            section=section,
            model=model,
            dtype=self.dtype,
            device=self.device,
            probe=self.probe if serves else (),
            total=total,
            seed=self.config.seed,
            deterministic=self.config.deterministic,
            run_dir=self.run_dir,
            publishes=("full" if whole else "adapter") if serves else "final",
            storage=self.storage.url,
            frozen=self.frozen if isinstance(section, Preference) else None,
        )
