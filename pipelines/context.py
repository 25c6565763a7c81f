"""What every pipeline of a run shares: the config, the directory, the tokenizer, the fleet, the pool, the event log."""

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from actors.spawn import Fleet
from actors.train_loop import LearnerSpec
from pipelines.pool import Pool
from plumbline.config import Config, FullPolicy, Pipeline
from plumbline.records import Prompt, TokenGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Event = Mapping[str, Any]


class EventLog:
    """`events.jsonl`: one line a step; every event also goes to `listen`, which shows it.

    A last line without its end is of a process that was killed while it wrote, and is dropped.
    """

    def __init__(self, path: Path, listen: Callable[[Event], None]) -> None:
        self._path = path
        self._listen = listen

    def keep(self, pipeline: str, done: int) -> int:
        """Drop a pipeline's lines of steps after `done`, which will be done again; returns the last step that stays."""
        if not self._path.exists():
            return 0
        lines = [
            json.loads(line) for line in self._path.read_text("utf-8").splitlines(keepends=True) if line[-1] == "\n"
        ]
        kept = [e for e in lines if e.get("pipeline") != pipeline or e.get("step", 0) <= done]
        aside = self._path.with_suffix(".aside")
        aside.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")
        os.replace(aside, self._path)
        return max((e["step"] for e in kept if e.get("pipeline") == pipeline and "step" in e), default=0)

    def write(self, event: Event) -> None:
        """Add a line and show it. What is no finite number, such as a drift that drowned in noise, becomes null."""
        event = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), **event}) + "\n")
        self._listen(event)

    def say(self, message: str) -> None:
        """Show a line without logging it."""
        self._listen({"message": message})


@dataclass(slots=True, kw_only=True)
class Context:
    """One run. `model_path` is π0's directory: the config's model, or what the `sft` section made of it.

    `fingerprint` says which model that is, where the run has a reference.
    """

    config: Config
    run_dir: Path
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    tokenizer: "PreTrainedTokenizerBase"
    prompts: list[Prompt]
    events: EventLog
    fleet: Fleet
    probe: tuple[TokenGroup, ...] = ()
    model_path: str = ""
    fingerprint: str = ""
    pool: Pool = field(default_factory=lambda: Pool([], 0))
    _turns: Iterator[int] = field(default_factory=itertools.count)

    def pick(self, replicas: Sequence[Any]) -> Any:
        """One of an actor's replicas, each in turn."""
        return replicas[next(self._turns) % len(replicas)]

    def learner_spec(self, section: Pipeline, total: int, *, serves: bool) -> LearnerSpec:
        """A learner that starts from π0, or from the config's model where π0 is yet to be made.

        Args:
            serves: its versions go to generators; else there is one model at the end.
        """
        whole = isinstance(getattr(section, "policy", None), FullPolicy)
        model = self.config.model
        if self.model_path and self.model_path != model.path:
            model = model.model_copy(update={"path": self.model_path, "init": None, "tokenizer": None})
        return LearnerSpec(
            section=section,
            model=model,
            dtype=self.dtype,
            device=self.device,
            probe=self.probe if serves else (),
            total=total,
            seed=self.config.seed,
            run_dir=self.run_dir,
            publishes=("full" if whole else "adapter") if serves else "final",
        )
