"""Preference pairs that are there already: parts that another run made, or a preference file. Read before a run too."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plumbline.config import Source
from plumbline.dataset import read_preferences
from plumbline.errors import DataError
from plumbline.pairs import PAIR_SCHEMA
from plumbline.parts import Parts
from plumbline.records import Prompt


def is_parts(source: Source) -> bool:
    """Whether a source is a directory of parts rather than a file or dataset."""
    return any(Path(source.path).glob("step-*.parquet")) or (Path(source.path) / "rejected.parquet").exists()


def read_parts(source: Source) -> Sequence[Mapping[str, Any]]:
    """Rows of another run's pairs, in the order of its steps. Raises DataError where there are none."""
    rows = Parts(source.path, read_only=True).read_all() if Path(source.path).is_dir() else []
    if not rows:
        raise DataError(f"{source.path}: no pairs in it; name a directory of parts, such as runs/NAME/pairs/dlma")
    if missing := set(PAIR_SCHEMA.names) - set(rows[0]):
        raise DataError(f"{source.path}: parts without {sorted(missing)[0]}: these are no preference pairs")
    return rows


def check_model(source: Source, rows: Sequence[Mapping[str, Any]], fingerprint: str) -> None:
    """Raises DataError where a row's log-probs are of another model than the one of `fingerprint`."""
    for row in rows:
        if row["model"] != fingerprint:
            raise DataError(
                f"{source.path}: parts of another model ({row['model'][:12]}, this run's is {fingerprint[:12]}): their "
                "reference log-probs do not hold for it; set `model.path` to theirs, or make the parts anew"
            )


def read_given_preferences(source: Source) -> list[Prompt]:
    """Prompts with `chosen` and `rejected` answers of a preference file.

    Raises:
        DataError: a row lacks one, or every row's answers are equal.
    """
    rows = read_preferences(source.path, **source.reading)
    if not any(usable_rejected(prompt) for prompt in rows):
        raise DataError(
            f"{source.path}: in all {len(rows)} rows chosen and rejected are the same text: there is nothing to prefer"
        )
    return rows


def usable_rejected(prompt: Prompt) -> list[str]:
    """A row's rejected answers, each once, without those that are equal to its chosen one (METHODS.md §4)."""
    return [text for text in dict.fromkeys(prompt.rejected) if text != prompt.chosen]
