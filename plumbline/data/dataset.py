"""Prompts, preferences and labelled texts, checked row by row; called by every pipeline and by `plumbline validate`.

`columns` maps our names to a file's: ``{"prompt": "question"}``. What is wrong with a row is one line that names the
file, the row, the key, and what would be right. Reading the files themselves is in `plumbline.data.readers`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar, Unpack

from plumbline.config.reading import OnBad, Reading
from plumbline.data.forms import Target, read_answer, read_asked, read_pair, read_target, unread_answers
from plumbline.data.readers import Place, PlacedRow, read_rows, stop
from plumbline.data.row import Row, close, shown
from plumbline.errors import DataError, RowError
from plumbline.records import Message, Prompt

PROMPT_KEYS = ("id", "prompt", "messages", "target", "chosen", "rejected")
LABELLED_KEYS = ("text", "label", "prompt", "messages")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledText:
    """A text and whether it is a wanted one (label 1.0) or not (0.0), with the conversation that it answers, if any."""

    text: str
    label: float
    messages: tuple[Message, ...] | None = None
    row: int = field(default=0, compare=False)


def read_prompts(path: str, *, target: Target = "unread", **reading: Unpack[Reading]) -> list[Prompt]:
    """Prompts of a file or dataset, in any of the forms of `plumbline.data.forms`.

    Columns that are not ours and that `columns` does not name go to `Prompt.extra`, where JSON has a scalar for them.
    `id` defaults to the row's number from 1; any scalar id becomes text. Answers that nobody reads are not checked:
    they are there where they are text.

    Raises:
        DataError: one line naming the file, the row, the key, what is wrong and what would be right. RowError where
            one row is wrong, unless `on_bad` takes it.
    """
    return _prompts(path, reading, lambda row: _prompt(row, target))


def read_preferences(path: str, **reading: Unpack[Reading]) -> list[Prompt]:
    """As `read_prompts`, and every row has `chosen` and `rejected` answers, of the latter one or several.

    Raises:
        DataError: as `read_prompts`; a row without one of the two.
    """
    return _prompts(path, reading, _preference)


def read_labelled(path: str, **reading: Unpack[Reading]) -> list[LabelledText]:
    """Texts labelled 0 or 1, to train a reward model on; with what they answer where a row has that.

    Raises:
        DataError: as `read_prompts`; a label that is not 0 or 1.
    """
    return list(_parsed(path, LABELLED_KEYS, reading, _labelled))


def as_row(record: Prompt | LabelledText) -> dict[str, object]:
    """A row that is read as this record, in our own columns."""
    turns = [{"role": turn.role, "content": turn.content} for turn in record.messages or ()]
    plain = [turn["role"] for turn in turns] == ["user"]
    row: dict[str, object] = {"prompt": turns[0]["content"]} if plain else {"messages": turns} if turns else {}
    if isinstance(record, LabelledText):
        return {**row, "text": record.text, "label": record.label}
    target = "" if record.target is None and "completion" in record.extra else record.target  # "": it has none
    answers = {"target": target, "chosen": record.chosen, "rejected": list(record.rejected) or None}
    given = {name: value for name, value in answers.items() if value is not None}
    others = {name: value for name, value in record.extra.items() if name not in PROMPT_KEYS}  # ours come first
    return {"id": record.id, **row, **given, **others}


def as_lines(records: Iterable[Prompt | LabelledText]) -> str:
    """A JSON Lines file's text, of `as_row`'s rows."""
    return "".join(json.dumps(as_row(record), ensure_ascii=False) + "\n" for record in records)


def summarize(prompts: Sequence[Prompt]) -> dict[str, int | float]:
    """What `plumbline validate` shows: counts, shares in [0, 1], and characters of the whole conversation."""
    characters = [sum(len(turn.content) for turn in prompt.messages) for prompt in prompts]
    rows = len(prompts)
    return {
        "rows": rows,
        "multi_turn_share": sum(sum(t.role != "system" for t in p.messages) > 1 for p in prompts) / max(rows, 1),
        "with_target": sum(p.target is not None for p in prompts),
        "with_preference": sum(p.chosen is not None and bool(p.rejected) for p in prompts),
        "min_characters": min(characters, default=0),
        "mean_characters": sum(characters) / max(rows, 1),
        "max_characters": max(characters, default=0),
    }


def _prompts(path: str, reading: Reading, parse: Callable[[Row], Prompt]) -> list[Prompt]:
    """Each with an id of its own."""
    place_of: dict[str, Place] = {}

    def own(row: Row) -> Prompt:
        prompt = parse(row)
        if first := place_of.get(prompt.id):
            where = f"row {first.row}" if first.file == row.place.file else str(first)
            row.fail("id", f"{prompt.id!r} is {where}'s already; give every row an id of its own")
        place_of[prompt.id] = row.place
        return prompt

    return list(_parsed(path, PROMPT_KEYS, reading, own))


def _prompt(row: Row, target: Target) -> Prompt:
    asked = read_asked(row)
    chosen, rejected = unread_answers(row, asked)
    return Prompt(
        id=row.identity(),
        messages=asked.messages,
        target=read_target(row, asked, target),
        chosen=chosen,
        rejected=rejected,
        extra=row.extra(asked.taken),
        row=row.place.number,
    )


def _preference(row: Row) -> Prompt:
    pair = read_pair(row)
    return Prompt(
        id=row.identity(),
        messages=pair.messages,
        target=row.unread("target"),
        chosen=pair.chosen,
        rejected=pair.rejected,
        extra=row.extra(pair.taken),
        row=row.place.number,
    )


def _labelled(row: Row) -> LabelledText:
    text, messages = read_answer(row)
    return LabelledText(text=text, label=row.label(), messages=messages, row=row.place.number)


def _parsed(path: str, keys: Sequence[str], reading: Reading, parse: Callable[[Row], _T]) -> Iterator[_T]:
    """What is made of each row; a bad one goes to `on_bad`."""
    on_bad = reading.get("on_bad") or stop
    for row in _rows(path, keys, reading, on_bad):
        try:
            yield parse(row)
        except RowError as error:
            on_bad(error)


def _rows(path: str, keys: Sequence[str], reading: Reading, on_bad: OnBad) -> Iterator[Row]:
    """Rows with their mapping, once the mapping itself is checked; a mapped column that no row has is an error."""
    mapped, where, limit = dict(reading.get("columns") or {}), reading.get("where"), reading.get("limit")
    for ours in mapped:
        if ours not in keys:
            near = close(ours, keys)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise DataError(f"{path}: columns names {ours!r}, which is none of ours; {hint}ours are {', '.join(keys)}")
    if limit is not None and limit < 1:
        raise DataError(f"{path}: limit is {limit}; it should be 1 or more")
    unseen = dict(mapped)
    seen: dict[str, object] = {}
    rows = read_rows(path, split=reading.get("split", "train"), limit=None if where else limit, on_bad=on_bad)
    for place, values in islice(_matching(path, rows, where, on_bad), limit) if where else rows:
        unseen = {ours: name for ours, name in unseen.items() if name not in values}
        if unseen:
            seen.update(values)
        yield Row(place, values, mapped, keys)
    for ours, name in unseen.items():
        near = close(name, seen)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{path}: columns maps {ours} to {name!r}, which no row has{hint} (rows have {shown(seen)})")


def _matching(path: str, rows: Iterable[PlacedRow], where: Mapping[str, object], on_bad: OnBad) -> Iterator[PlacedRow]:
    """The rows that have the values of `where`. Raises DataError where there is none, with what was there instead."""
    found = False
    seen: dict[str, dict[str, None]] = {name: {} for name in where}
    for place, values in rows:
        if missing := [name for name in where if name not in values]:
            near = next(iter(close(missing[0], values)), None)
            hint = f"; did you mean {near!r}?" if near else ""
            on_bad(RowError(place.file, place.row, None, f"no {missing[0]!r}, which `where` asks for{hint}"))
            continue
        if all(values[name] == value for name, value in where.items()):
            found = True
            yield place, values
        elif not found:
            for name in where:
                seen[name].setdefault(f"{values[name]!r:.40}")
    if not found:
        were = "; ".join(f"{name} is {', '.join([*values][:5])}" for name, values in seen.items())
        raise DataError(f"{path}: no row has {dict(where)}, as `where` asks for: {were}")
