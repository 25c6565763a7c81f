"""How the rows of a file are read: what a config says of a source, and what the readers of `plumbline.data` take."""

from collections.abc import Callable, Mapping
from typing import TypedDict

from plumbline.errors import RowError

OnBad = Callable[[RowError], None]
"""Is given a row that cannot be read, and raises it or goes on without it."""


class Reading(TypedDict, total=False):
    """Which rows of a file or dataset are read, and under which names.

    Attributes:
        columns: our name -> the file's column.
        where: a column of the file -> its value in the rows to read; others are passed over, unchecked.
        split: of a Hugging Face dataset; "train" by default.
        limit: read the first such rows only.
        on_bad: is given each row that cannot be read; by default the first one is raised.
    """

    columns: Mapping[str, str]
    where: Mapping[str, str | int | float | bool]
    split: str
    limit: int | None
    on_bad: OnBad
