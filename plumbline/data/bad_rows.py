"""Rows of one file that cannot be used: the first one ends the start, or all are kept count of up to a share."""

import re
from collections.abc import Iterable, Sequence

from plumbline.errors import DataError, RowError


class BadRows:
    """What `on_bad` of the readers is given, and what says how many there may be.

    Args:
        path: the file, as messages name it.
        allowed: the share of its rows; None: not even one.
    """

    def __init__(self, path: str, allowed: float | None) -> None:
        self.path = path
        self._allowed = allowed
        self._errors: dict[tuple[str, int], RowError] = {}

    def __call__(self, error: RowError) -> None:
        """Keep a row's first error. Raises it where there may be none."""
        if self._allowed is None:
            raise error
        self._errors.setdefault((error.file, error.row), error)

    @property
    def errors(self) -> Sequence[RowError]:
        """One for each bad row."""
        return list(self._errors.values())

    def check(self, good: int) -> None:
        """Raises DataError where there are more than the share, beside so many good ones."""
        bad = len(self._errors)
        if self._allowed is not None and bad > self._allowed * (bad + good):
            raise DataError(
                f"{self.path}: {bad} of {bad + good} rows cannot be used, and data.max_bad_rows allows a share of "
                f"{self._allowed:g}; the first: {self.errors[0]}"
            )


def by_reason(errors: Iterable[RowError]) -> list[str]:
    """A line for each thing that is wrong, most often first: one row's own, and the numbers of the other ones'."""
    groups: dict[tuple[str | None, str], list[RowError]] = {}
    for error in errors:
        groups.setdefault((error.key, _VARIES.sub("_", error.problem)), []).append(error)
    return [f"{first}{_others(others)}" for first, *others in sorted(groups.values(), key=lambda group: -len(group))]


_SHOWN = 9
_VARIES = re.compile(r"'[^']*'|\d+")  # what a message names of its row


def _others(errors: Sequence[RowError]) -> str:
    if not errors:
        return ""
    numbers = ", ".join(str(error.row) for error in errors[:_SHOWN])
    return f" ({len(errors)} more: rows {numbers}{', …' if len(errors) > _SHOWN else ''})"
