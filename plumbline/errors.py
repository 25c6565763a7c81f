"""Every error that Plumbline raises on purpose, under one base. All of them survive pickling between processes.

``UserError`` is wrong use (the CLI prints its one line and exits with 2); the others are failures at run time (exit 1).
"""

import re
from collections.abc import Sequence


class PlumblineError(Exception):
    """Base of all errors below; its message is one line fit for a user's eyes."""


class UserError(PlumblineError, ValueError):
    """Wrong use: names the file, the row or the key, what was wrong and what would be right."""


class ConfigError(UserError):
    """A config file, key or value that cannot be run."""


class DataError(UserError):
    """A data file or row that cannot be read."""


class RowError(DataError):
    """One row of a data file that cannot be read; the others may be.

    Attributes:
        file, row: where it is; a JSON Lines row's number is its line's.
        key: the file's column that is wrong, where it is one.
        problem: what is wrong with it, and what would be right.
    """

    def __init__(self, file: str, row: int, key: str | None, problem: str) -> None:
        super().__init__(file, row, key, problem)  # the args are what pickle rebuilds it from
        self.file, self.row, self.key, self.problem = file, row, key, problem

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}{'' if self.key is None else f', {self.key}'}: {self.problem}"


class ModelError(UserError):
    """A directory or model that is not what it was named to be."""


class RunError(PlumblineError):
    """A failure at run time; what was saved stays usable."""


class DiskError(RunError):
    """A disk is full, or may not be written."""


class LostError(RunError):
    """A process or its node died before it answered; asking another may help."""


class LossError(RunError):
    """The loss or its gradient became NaN or infinite."""


class SyncError(RunError):
    """An engine does not answer as the version it was told to load (docs/architecture.md, "Proofs").

    Attributes:
        policy, version: what should have been loaded.
        engine: the engine that failed the proof.
        difference: largest absolute difference of probe log-probs, in nats.
    """

    def __init__(self, policy: str, version: int, engine: str, difference: float, reason: str) -> None:
        super().__init__(policy, version, engine, difference, reason)  # the args are what pickle rebuilds it from
        self.policy = policy
        self.version = version
        self.engine = engine
        self.difference = difference
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"{self.policy} v{self.version:06d} did not arrive at engine {self.engine}: {self.reason} "
            f"(largest log-prob difference {self.difference:.3g})"
        )


def in_one_line(error: BaseException) -> str:
    """An error's type and what it says, in one line: of a traceback in its message what was raised at its end, without
    the hints and addresses that libraries put below.
    """
    kind, text = type(error).__name__, _COLOURS.sub("", str(error)).strip()
    *_, after = _FRAME.split(f"\n{text}")
    if after != f"\n{text}" and (raised := _RAISED.search(after)):  # another process's, as Ray hands it over
        kind, text = raised["kind"].rpartition(".")[2], after[raised.start("said") :].strip()
    return f"{kind}: {_said(text.splitlines())}"


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = re.compile(r'\n\s+File "[^\n]*')
_RAISED = re.compile(r"^(?P<kind>[A-Za-z_][\w.]*)(?:: |:?$)(?P<said>)", re.MULTILINE)
_COUNT = re.compile(r"\d+ validation errors? for ")


def _said(lines: Sequence[str]) -> str:
    """The line of a message that says most: its first, for most libraries."""
    if len(lines) < 2:
        return "".join(lines)
    first, second, last = lines[0], lines[1], lines[-1]
    if _COUNT.match(first):  # pydantic: a place on a line of its own, unless it is the whole, then what is wrong there
        place = "" if second.startswith("  ") else f"{second}: "
        told = " ".join(line.strip() for line in lines[2 if place else 1 :])
        return place + told.partition(" [type=")[0].removeprefix("Value error, ")
    if first.endswith(":"):  # a heading
        return f"{first} {second.strip()}"
    if second.startswith("\t") and not last.startswith("\t"):  # Ray's deaths: which actor, and below that why
        return last
    return first
