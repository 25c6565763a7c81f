"""Texts to token ids, many at a time, and how many tokens a text has at most: a look at its bytes is a hundredth of
the work of tokenising it, and enough for most rows to know that they fit.
"""

import json
import re
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NORMALIZERS = {"NFC": 3, "NFD": 3}
"""Most bytes that one of UTF-8 becomes (Unicode, UAX #15); of ASCII neither changes anything."""
_SPLITTERS = (
    "Split",
    "Digits",
    "Punctuation",
    "Whitespace",
    "WhitespaceSplit",
    "CharDelimiterSplit",
)
"""What cuts a text and adds nothing to it."""
_OFTEN, _KEPT = 8, 1024
"""Among so many texts, one that is seen so often comes again and again."""
_turn = threading.Lock()
_bounds: "WeakKeyDictionary[PreTrainedTokenizerBase, _Bound]" = WeakKeyDictionary()


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, split_special_tokens: bool = False
) -> list[list[int]]:
    """Ids of each text and nothing around them, in one call of the tokenizer, which gives it all its threads."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        settings = {"add_special_tokens": False, "split_special_tokens": split_special_tokens}
        return tokenized(tokenizer, list(texts), **settings)["input_ids"]
    with _turn:  # without what transformers makes of the ids, which takes as long as they do
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def tokenized(tokenizer: "PreTrainedTokenizerBase", *texts: Any, **settings: Any) -> dict[str, Any]:
    """What a tokenizer returns of texts; whoever calls one does it here.

    One thread at a time: transformers sets whether special tokens are split on the tokenizer itself, so of two threads
    that ask for either at once, one got the ids of the other's way.
    """
    with _turn:
        return dict(tokenizer(*texts, **settings))


def most_tokens(tokenizer: "PreTrainedTokenizerBase", text: str, *, split_special_tokens: bool = False) -> int | None:
    """What the text has no more tokens than; None where nobody knows."""
    return _bound(tokenizer).of(tokenizer, text, split_special_tokens)


def most_around(tokenizer: "PreTrainedTokenizerBase", between: Sequence[str]) -> int | None:
    """What `between` has no more tokens than, whatever stands between its parts; None where nobody knows.

    With `most_bytes` of these texts added, it bounds the whole, if none of them holds a special token.
    """
    return _bound(tokenizer).around(tokenizer, between)


def most_bytes(tokenizer: "PreTrainedTokenizerBase") -> Callable[[str], int]:
    """`most_tokens` of a part of a text by a look at its bytes alone; where `most_around` is known."""
    return _bound(tokenizer).by_bytes


def _bound(tokenizer: "PreTrainedTokenizerBase") -> "_Bound":
    if tokenizer not in _bounds:
        _bounds[tokenizer] = _Bound(tokenizer)
    return _bounds[tokenizer]


class Often:
    """Whether a text comes again and again, such as a system turn, among others that do not."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def __call__(self, text: str) -> bool:
        seen = self._seen.get(text, 0) + 1
        if len(self._seen) >= _KEPT:
            self._seen.clear()
        self._seen[text] = seen
        return seen >= _OFTEN


class _Bound:
    """How many tokens of a tokenizer a text is at most.

    Every model of `tokenizers` makes a token of a character at least, or of a byte of one that it does not know. So
    bytes bound tokens, as far as what comes before the model adds nothing to the text. Special tokens are split off
    before that, and are one token each; what stands between them again and again, such as a system turn, is counted.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._growth = _growth(getattr(tokenizer, "backend_tokenizer", None))
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
        alone = not any(token.lstrip or token.rstrip or token.single_word or token.normalized for token in special)
        marks = sorted((token.content for token in special), key=len, reverse=True) if alone else []
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None
        begins = {mark[:end] for mark in marks for end in range(1, len(mark))}
        self._overlap = any(mark[start:] in begins for mark in marks for start in range(1, len(mark)))
        self._often = Often()
        self._counts: dict[str, int] = {}

    def of(self, tokenizer: "PreTrainedTokenizerBase", text: str, split_special_tokens: bool) -> int | None:
        if self._growth is None:
            return None
        if split_special_tokens or self._marks is None:
            return self.by_bytes(text)
        pieces = self._marks.split(text)
        return len(pieces) - 1 + sum(self._piece(tokenizer, piece) for piece in pieces if piece)

    def around(self, tokenizer: "PreTrainedTokenizerBase", between: Sequence[str]) -> int | None:
        if self._growth is None or self._overlap:  # a text's end and a mark's beginning could be a mark together
            return None
        total = 0
        for position, part in enumerate(between):
            pieces = self._marks.split(part) if self._marks else [part]
            total += len(pieces) - 1
            for i, piece in enumerate(pieces):
                meets = (i == 0 and position > 0) or (i == len(pieces) - 1 and position < len(between) - 1)
                total += self.by_bytes(piece) if meets or not piece else len(encode_texts(tokenizer, [piece])[0])
        return total

    def _piece(self, tokenizer: "PreTrainedTokenizerBase", piece: str) -> int:
        if not self._often(piece):
            return self.by_bytes(piece)
        if len(self._counts) >= _KEPT:
            self._counts.clear()
        if piece not in self._counts:
            self._counts[piece] = len(encode_texts(tokenizer, [piece])[0])
        return self._counts[piece]

    def by_bytes(self, text: str) -> int:
        assert self._growth is not None
        return len(text) if text.isascii() else self._growth * len(text.encode())


def _growth(backend: Any) -> int | None:
    """Most tokens that a byte of text can become, of one that is no ASCII; None where nobody knows, as where a
    SentencePiece model's marks of spaces are put in."""
    if backend is None:
        return None
    growth = 1
    for one in _parts(backend.normalizer):
        if one["type"] not in _NORMALIZERS:
            return None
        growth = _NORMALIZERS[one["type"]]
    for one in _parts(backend.pre_tokenizer):
        # a byte is a character of its own there, of two bytes: a model that knows it not would make two of them
        bytewise = one["type"] == "ByteLevel" and not one["add_prefix_space"]
        if not (one["type"] in _SPLITTERS or (bytewise and not getattr(backend.model, "byte_fallback", False))):
            return None
    return growth


def _parts(component: Any) -> list[dict[str, Any]]:
    """A component's settings, or those of each that a sequence is of."""
    if component is None:
        return []
    settings = json.loads(component.__getstate__())
    return next((settings[key] for key in ("normalizers", "pretokenizers") if key in settings), [settings])
