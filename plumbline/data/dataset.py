"""Prompts, preferences and labelled texts, checked row by row; called by every pipeline and by `plumbline validate`.

`columns` maps our names to a file's: ``{"prompt": "question"}``. What is wrong with a row is one line that names the
file, the row, the key, and what would be right. Reading the files themselves is in `plumbline.data.readers`.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, NoReturn, TypeGuard, Unpack

from plumbline.config.reading import Reading
from plumbline.data.readers import Place, PlacedRow, read_rows
from plumbline.errors import DataError
from plumbline.records import Message, Prompt

PROMPT_KEYS = ("id", "prompt", "messages", "target", "chosen", "rejected")
LABELLED_KEYS = ("text", "label", "prompt", "messages")
ROLES = ("system", "user", "assistant")
Target = Literal["unread", "read", "needed"]
"""What is asked of the targets: nothing, to be text or nothing (null or blank), or to be text in every row."""


# What other datasets call ours: the remedy named when no column's spelling is close to our name.
_SYNONYMS = {
    "prompt": ("question", "query", "instruction", "input", "text"),
    "target": ("answer", "response", "output", "completion"),
    "text": ("review", "sentence", "comment", "content"),
    "messages": ("conversation", "conversations", "turns"),
    "label": ("sentiment", "class", "labels"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledText:
    """A text and whether it is a wanted one (label 1.0) or not (0.0), with the conversation that it answers, if any."""

    text: str
    label: float
    messages: tuple[Message, ...] | None = None
    row: int = field(default=0, compare=False)


def read_prompts(path: str, *, target: Target = "unread", **reading: Unpack[Reading]) -> list[Prompt]:
    """Prompts of a file or dataset: a row has `prompt` (text), or `messages` ({role, content}, a user's turn last).

    Columns that are not ours and that `columns` does not name go to `Prompt.extra`, where JSON has a scalar for them.
    `id` defaults to the row's number from 1; any scalar id becomes text. Answers that nobody reads are not checked:
    they are there where they are text.

    Raises:
        DataError: one line naming the file, the row, the key, what is wrong and what would be right.
    """
    return [prompt for _, prompt in _prompts(path, reading, target)]


def read_preferences(path: str, **reading: Unpack[Reading]) -> list[Prompt]:
    """As `read_prompts`, and every row has `chosen` text and `rejected`: one text or a list of several.

    Raises:
        DataError: as `read_prompts`; a row without one of the two.
    """
    return [
        replace(prompt, chosen=row.required_text("chosen"), rejected=row.texts("rejected"))
        for row, prompt in _prompts(path, reading, "unread")
    ]


def read_labelled(path: str, **reading: Unpack[Reading]) -> list[LabelledText]:
    """Texts labelled 0 or 1, to train a reward model on; with `prompt` or `messages` where a row has what they answer.

    Raises:
        DataError: as `read_prompts`; a label that is not 0 or 1.
    """
    return [
        LabelledText(
            text=row.required_text("text"),
            label=row.label(),
            messages=row.conversation() if row.has("prompt") or row.has("messages") else None,
            row=row.place.number,
        )
        for row in _rows(path, LABELLED_KEYS, reading)
    ]


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


@dataclass(slots=True)
class _Row:
    """One raw row, and how to name it in an error. `columns` is our name -> the file's, mapped ones only."""

    place: Place
    values: Mapping[str, object]
    columns: Mapping[str, str]
    keys: Sequence[str]

    def fail(self, key: str, problem: str) -> NoReturn:
        raise DataError(f"{self.place}, {self.columns.get(key, key)}: {problem}")

    def get(self, key: str) -> object:
        """The value of one of our keys; None where it is absent, null or not a number."""
        value = self.values.get(self.columns.get(key, key))
        return None if isinstance(value, float) and math.isnan(value) else value

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def text(self, key: str) -> str | None:
        """The text of a column that may be empty: null and blank are alike."""
        value = self.get(key)
        return None if value is None or (isinstance(value, str) and not value.strip()) else self.checked(key, value)

    def unread(self, key: str) -> str | None:
        """The text of a column that nobody reads, if it is any."""
        value = self.get(key)
        return value if _is_text(value) else None

    def unread_texts(self, key: str) -> tuple[str, ...]:
        """As `unread`, of a column that may have a list."""
        value = self.get(key)
        return tuple(one for one in (value if isinstance(value, list) else [value]) if _is_text(one))

    def required_text(self, key: str) -> str:
        if not self.has(key):
            self.missing(key, f"`{key}`")
        return self.checked(key, self.get(key))

    def texts(self, key: str) -> tuple[str, ...]:
        """One text, or each of a list of them."""
        value = self.get(key)
        if isinstance(value, list):
            if not value:
                self.fail(key, "is an empty list; write at least one text, or remove the row")
            return tuple(self.checked(key, one, f"text {n} ") for n, one in enumerate(value, start=1))
        return (self.required_text(key),)

    def checked(self, key: str, value: object, what: str = "") -> str:
        """`value` if it is text that can be tokenised; `what` names the part of the column that it is."""
        if not isinstance(value, str):
            kind = type(value).__name__
            hint = "; several turns go under `messages`" if key == "prompt" and isinstance(value, list) else ""
            self.fail(key, f"{what}is {_article(kind)}, not text; write it as a string{hint}")
        if not value.strip():
            self.fail(key, f"{what}is blank; write text, or remove the row")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.fail(key, f"{what}holds half a character (a lone surrogate) at {error.start}; write whole characters")
        return value

    def identity(self) -> str:
        value = self.get("id")
        if value is None:
            return str(self.place.number)
        if not isinstance(value, str | int | float):
            self.fail("id", f"is {_article(type(value).__name__)}; it should be text or a number")
        if not str(value).strip():
            self.fail("id", "is blank; write an id, or leave the key out to use row numbers")
        return str(value)

    def conversation(self) -> tuple[Message, ...]:
        plain, turns = self.has("prompt"), self.has("messages")
        if plain and turns:
            if ("prompt" in self.columns) == ("messages" in self.columns):
                self.fail(
                    "prompt", "the row has `messages` too; say which by `columns: {prompt: prompt}` or {messages: ...}"
                )
            plain = "prompt" in self.columns
        elif not plain and not turns:
            self.missing("messages" if "messages" in self.columns else "prompt", "`prompt` or `messages`")
        if plain:
            return (Message(role="user", content=self.checked("prompt", self.get("prompt"))),)
        return self.turns(self.get("messages"))

    def turns(self, value: object) -> tuple[Message, ...]:
        if not isinstance(value, list) or not value:
            kind = "empty" if isinstance(value, list) else _article(type(value).__name__)
            self.fail("messages", f"is {kind}; it should be a list of {{role, content}}, one a turn")
        messages = tuple(self.turn(position, turn) for position, turn in enumerate(value, start=1))
        if messages[-1].role != "user":
            last = messages[-1].role
            self.fail(
                "messages",
                f"ends with a turn of the {last}; it should end with the user's: move the answer to `target`",
            )
        return messages

    def turn(self, position: int, turn: object) -> Message:
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            has = f"has {_shown(turn)}" if isinstance(turn, Mapping) else f"is {_article(type(turn).__name__)}"
            self.fail("messages", f"turn {position} {has}; it should have role and content")
        role = turn["role"]
        if role not in ROLES:
            self.fail(
                "messages", f"turn {position} has the unknown role {role!r}; it should be one of {', '.join(ROLES)}"
            )
        if role == "system" and position > 1:
            self.fail("messages", f"turn {position} is a system turn; only the first turn may be one")
        return Message(role=role, content=self.checked("messages", turn["content"], f"content of turn {position} "))

    def label(self) -> float:
        if not self.has("label"):
            self.missing("label", "`label`")
        value = self.get("label")
        try:
            number = float(value) if isinstance(value, str | int | float) else math.nan
        except ValueError:
            number = math.nan
        if number not in (0.0, 1.0):
            self.fail("label", f"is {value!r:.40}; it should be 0 or 1 (1 is the wanted kind)")
        return number

    def extra(self) -> dict[str, object]:
        used = {self.columns.get(key, key) for key in self.keys}
        return {name: value for name, value in self.values.items() if name not in used and _is_json_scalar(value)}

    def missing(self, key: str, wanted: str) -> NoReturn:
        name = self.columns.get(key, key)
        if name in self.values:
            self.fail(key, "is empty; write text, or remove the row")
        has = _shown(self.values) or "nothing"
        near = _nearest(key, self.values) if key == name else next(iter(_close(name, self.values)), None)
        remedy = f"name the column that holds it, as in `columns: {{{key}: {_shown([near or '...'])}}}`"
        what = wanted if key == name else repr(name)
        raise DataError(f"{self.place}: no {what}; it has {has}: {remedy}")


def _nearest(key: str, names: Mapping[str, object] | Sequence[str]) -> str | None:
    """The name most likely meant by our `key`: a close spelling, else what other datasets call it."""
    close = _close(key, names)
    return close[0] if close else next((name for name in _SYNONYMS.get(key, ()) if name in names), None)


def _close(key: str, names: Mapping[str, object] | Sequence[str]) -> list[str]:
    lower = {str(name).lower(): str(name) for name in names}
    return [lower[found] for found in difflib.get_close_matches(key.lower(), lower, n=1)]


def _prompts(path: str, reading: Reading, target: Target) -> Iterator[tuple[_Row, Prompt]]:
    place_of: dict[str, Place] = {}
    targets = {"unread": lambda row: row.unread("target"), "read": lambda row: row.text("target")}
    read_target = targets.get(target, lambda row: row.required_text("target"))
    for row in _rows(path, PROMPT_KEYS, reading):
        prompt = Prompt(
            id=row.identity(),
            messages=row.conversation(),
            target=read_target(row),
            chosen=row.unread("chosen"),
            rejected=row.unread_texts("rejected"),
            extra=row.extra(),
            row=row.place.number,
        )
        if first := place_of.get(prompt.id):
            where = f"row {first.row}" if first.file == row.place.file else str(first)
            row.fail("id", f"{prompt.id!r} is {where}'s already; give every row an id of its own")
        place_of[prompt.id] = row.place
        yield row, prompt


def _rows(path: str, keys: Sequence[str], reading: Reading) -> Iterator[_Row]:
    """Rows with their mapping, once the mapping itself is checked; a mapped column that no row has is an error."""
    mapped, where, limit = dict(reading.get("columns") or {}), reading.get("where"), reading.get("limit")
    for ours in mapped:
        if ours not in keys:
            near = _close(ours, keys)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise DataError(f"{path}: columns names {ours!r}, which is none of ours; {hint}ours are {', '.join(keys)}")
    if limit is not None and limit < 1:
        raise DataError(f"{path}: limit is {limit}; it should be 1 or more")
    unseen = dict(mapped)
    seen: dict[str, object] = {}
    rows = read_rows(path, split=reading.get("split", "train"), limit=None if where else limit)
    for place, values in islice(_matching(path, rows, where), limit) if where else rows:
        unseen = {ours: name for ours, name in unseen.items() if name not in values}
        if unseen:
            seen.update(values)
        yield _Row(place, values, mapped, keys)
    for ours, name in unseen.items():
        near = _close(name, seen)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{path}: columns maps {ours} to {name!r}, which no row has{hint} (rows have {_shown(seen)})")


def _matching(path: str, rows: Iterable[PlacedRow], where: Mapping[str, object]) -> Iterator[PlacedRow]:
    """The rows that have the values of `where`. Raises DataError where there is none, with what was there instead."""
    found = False
    seen: dict[str, dict[str, None]] = {name: {} for name in where}
    for place, values in rows:
        for name in where:
            if name not in values:
                near = next(iter(_close(name, values)), None)
                hint = f"; did you mean {near!r}?" if near else ""
                raise DataError(f"{place}: no {name!r}, which `where` asks for{hint}")
        if all(values[name] == value for name, value in where.items()):
            found = True
            yield place, values
        elif not found:
            for name in where:
                seen[name].setdefault(f"{values[name]!r:.40}")
    if not found:
        were = "; ".join(f"{name} is {', '.join([*values][:5])}" for name, values in seen.items())
        raise DataError(f"{path}: no row has {dict(where)}, as `where` asks for: {were}")


def _shown(names: Iterable[object]) -> str:
    """Names of a file's columns in one line, whatever characters they have."""
    texts = map(str, names)
    return ", ".join(text if text.isprintable() else ascii(text) for text in texts)


def _is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that can be tokenised."""
    try:
        return isinstance(value, str) and bool(value.strip()) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def _is_json_scalar(value: object) -> bool:
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
