"""What a run shows while it works: in a terminal one live line a pipeline and one for the pool, else a line a step.

The command line gives it to `pipelines.run`, which calls it with every event.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

FIGURES = (
    ("tau", "τ", "{:.3f}"),
    ("reward_plain", "plain", "{:+.3f}"),
    ("reward_guided", "guided", "{:+.3f}"),
    ("gap", "gap", "{:+.3f}"),
    ("rank_share", "rank", "{:.0%}"),
    ("margin_mean", "R", "{:+.1f}"),
    ("agreement", "agrees", "{:.0%}"),
    ("retention", "kept", "{:.0%}"),
    ("data_accuracy", "data", "{:.0%}"),
    ("reward_chosen", "chosen", "{:+.3f}"),
    ("reward_rejected", "rejected", "{:+.3f}"),
    ("reward_best", "best", "{:+.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("staleness", "stale", "{:.0f}"),
    ("generator_idle", "idle gen", "{:.0%}"),
    ("learner_idle", "learn", "{:.0%}"),
    ("tokens_per_s", "tok/s", "{:.0f}"),
    ("learner_tokens_per_s", "learned", "{:.0f}"),
    ("mfu", "MFU", "{:.0%}"),
)
SHOWN_SAMPLES = 6


class Display:
    """Call it with events. As a context manager it leaves the terminal as it was."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, markup=False, soft_wrap=True)
        self._lines: dict[str, str] = {}
        self._live = Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        if "message" in event:
            self._console.print(event["message"])
            return
        if event["pipeline"] == "pool":
            line = pool_line(event)
        elif "step" in event:
            line = step_line(event)
        else:
            return
        if self._live:
            self._lines[event["pipeline"]] = line
            ordered = sorted(self._lines, key=lambda name: name == "pool")  # the pool's comes last
            self._live.update(Group(*(Text(self._lines[name], no_wrap=True, overflow="ellipsis") for name in ordered)))
        else:
            self._console.print(line)


def step_line(event: Mapping[str, Any]) -> str:
    """One step in one line, with what its pipeline has of the figures."""
    shown = [f"{event['pipeline']} {event['step']}/{event['steps']}"]
    shown += [f"{label} {form.format(event[key])}" for key, label, form in FIGURES if event.get(key) is not None]
    if event.get("seconds_left") is not None:
        shown.append(f"{duration(event['seconds_left'])} left")
    return " · ".join(shown)


def pool_line(event: Mapping[str, Any]) -> str:
    """The pool in one line: how fast, how full, and who had it."""
    shares = " ".join(f"{name} {share:.0%}" for name, share in event["shares"].items())
    return f"pool · tok/s {event['tokens_per_s']:.0f} · queue {event['queue']} · busy {event['utilisation']:.0%}" + (
        f" · {shares}" if shares else ""
    )


def result_text(result: Mapping[str, Any]) -> str:
    """The comparison table and some of its sample answers; empty where nothing was compared."""
    if not result:
        return ""
    lines = ["", result["table"]]
    for sample in result["samples"][:SHOWN_SAMPLES]:
        width = max(map(len, sample))
        lines += ["", *(f"  {name:>{width}}: {text}" for name, text in sample.items())]
    return "\n".join([*lines, ""])


def duration(seconds: float) -> str:
    """Such as 1:02:03 or 4:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
