"""One raw row of a data file: its values under our names, and the line that says what is wrong with one of them."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeGuard

from plumbline.data.readers import Place
from plumbline.errors import RowError

# What other datasets call ours: the remedy named when no column's spelling is close to our name.
_SYNONYMS = {
    "prompt": ("question", "query", "instruction", "input", "text"),
    "target": ("answer", "response", "output", "completion"),
    "text": ("review", "sentence", "comment", "content"),
    "messages": ("conversation", "conversations", "turns"),
    "label": ("sentiment", "class", "labels"),
}


@dataclass(slots=True)
class Row:
    """One raw row, and how to name it in an error.

    Every method raises RowError where the value is not what it should be.

    Attributes:
        columns: our name -> the file's, mapped ones only.
        keys: our names of what such a row may have.
    """

    place: Place
    values: Mapping[str, object]
    columns: Mapping[str, str]
    keys: Sequence[str]

    def fail(self, key: str, problem: str) -> NoReturn:
        raise RowError(self.place.file, self.place.row, self.columns.get(key, key), problem)

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

    def checked(self, key: str, value: object, what: str = "") -> str:
        """`value` if it is text that can be tokenised; `what` names the part of the column that it is."""
        if not isinstance(value, str):
            kind = type(value).__name__
            self.fail(key, f"{what}is {article(kind)}, not text; write it as a string")
        if not value.strip():
            self.fail(key, f"{what}is blank; write text, or remove the row")
        return self._whole(key, value, what)

    def _whole(self, key: str, value: str, what: str = "") -> str:
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
            self.fail("id", f"is {article(type(value).__name__)}; it should be text or a number")
        if not str(value).strip():
            self.fail("id", "is blank; write an id, or leave the key out to use row numbers")
        return self._whole("id", str(value))

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

    def extra(self, taken: Sequence[str] = ()) -> dict[str, object]:
        """What is none of ours and was not `taken` for one, where JSON has a scalar for it."""
        used = {*(self.columns.get(key, key) for key in self.keys), *taken}
        others = {name: value for name, value in self.values.items() if name not in used and _is_json_scalar(value)}
        for name, value in others.items():
            self._whole(ascii(name), name, "its name ")
            if isinstance(value, str):
                self._whole(name, value)
        return others

    def missing(self, key: str, wanted: str) -> NoReturn:
        name = self.columns.get(key, key)
        if name in self.values:
            self.fail(key, "is empty; write text, or remove the row")
        has = shown(self.values) or "nothing"
        near = nearest(key, self.values) if key == name else next(iter(close(name, self.values)), None)
        remedy = f"name the column that holds it, as in `columns: {{{key}: {shown([near or '...'])}}}`"
        what = wanted if key == name else repr(name)
        raise RowError(self.place.file, self.place.row, None, f"no {what}; it has {has}: {remedy}")


def nearest(key: str, names: Mapping[str, object] | Sequence[str]) -> str | None:
    """The name most likely meant by our `key`: a close spelling, else what other datasets call it."""
    near = close(key, names)
    return near[0] if near else next((name for name in _SYNONYMS.get(key, ()) if name in names), None)


def close(key: str, names: Mapping[str, object] | Sequence[str]) -> list[str]:
    lower = {str(name).lower(): str(name) for name in names}
    return [lower[found] for found in difflib.get_close_matches(key.lower(), lower, n=1)]


def shown(names: Iterable[object]) -> str:
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


def article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
