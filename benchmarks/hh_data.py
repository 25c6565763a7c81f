"""The files of `benchmarks/hh.py`: HH cut into two halves by conversation, of one the pairs that a reward model learns
from, of the other the prompts of the policies; and XSTest's prompts among those that are held out.

Rows of HH that begin with the same query are turns of one conversation, and stay together. Where a conversation goes is
a digest of that query: the same in every run, whatever else the file holds.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from plumbline.data.dataset import as_lines
from plumbline.records import Prompt

RESERVED = 0.2
"""Share of a half's conversations that nothing is trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Rows by what they are for: pairs, and prompts whose target is the chosen answer."""

    reward_train: list[Prompt]
    reward_heldout: list[Prompt]
    train: list[Prompt]
    heldout: list[Prompt]


def place(prompt: Prompt, of: str) -> float:
    """In [0, 1), the same for all rows of a conversation; `of` is what is drawn by it."""
    first = next(turn.content for turn in prompt.messages if turn.role == "user")
    digest = blake2b(f"{of}\n{first.strip()}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split(rows: Sequence[Prompt]) -> Split:
    """Two halves of the conversations, and of each what is held out, all in an order of their digests."""
    ordered = sorted(rows, key=lambda row: (place(row, "order"), row.id))
    ours = [as_prompt(row) for row in ordered if place(row, "half") >= 0.5]
    theirs = [row for row in ordered if place(row, "half") < 0.5]
    return Split(
        reward_train=[row for row in theirs if place(row, "reserved") >= RESERVED],
        reward_heldout=[row for row in theirs if place(row, "reserved") < RESERVED],
        train=[row for row in ours if place(row, "reserved") >= RESERVED],
        heldout=[row for row in ours if place(row, "reserved") < RESERVED],
    )


def as_prompt(row: Prompt) -> Prompt:
    """A pair's prompt with the chosen answer as the target, without its preference."""
    return replace(row, id=f"hh-{row.id}", target=row.chosen, chosen=None, rejected=())


def first_fitting(rows: Iterable[Prompt], most: int, fits: Callable[[Prompt], bool], multiple: int = 1) -> list[Prompt]:
    """The first rows that fit, at most `most`, in number a multiple of `multiple`: every update has as many prompts."""
    found = []
    for row in rows:
        if len(found) == most:
            break
        if fits(row):
            found.append(row)
    return found[: len(found) // multiple * multiple]


def parted(rows: Sequence[Prompt], at: int) -> tuple[list[Prompt], list[Prompt]]:
    """Rows in the order of `split` in two: at `at`, or where the conversation that is there ends."""
    while 0 < at < len(rows) and place(rows[at - 1], "order") == place(rows[at], "order"):
        at += 1
    return list(rows[:at]), list(rows[at:])


def balanced(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """XSTest's prompts, or so many of them, as many of each label as of the other as far as there are."""
    ordered = sorted(prompts, key=lambda row: place(row, "order"))
    if len(ordered) <= most:
        return ordered
    kinds = [[row for row in ordered if row.extra.get("label") == label][: most // 2] for label in ("safe", "unsafe")]
    return [row for kind in kinds for row in kind]


def whole_sentences(text: str) -> str:
    """A text up to the end of its last whole sentence; as it is where it has none."""
    ends = list(re.finditer(r"[.!?][\"'”’)]*(?=\s|$)", text))
    return text[: ends[-1].end()] if ends else text


def write_rows(path: Path, rows: Iterable[Prompt]) -> None:
    """Rows as a JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_lines(rows), encoding="utf-8")
