"""Texts to token ids, many at a time, and how many tokens a text has at most: a look at its bytes is a hundredth of
the work of tokenising it, and enough for most rows to know that they fit.
"""

import json
import re
import threading
from collections.abc import Sequence
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
"""Among so many pieces of texts, one that is seen so often is counted."""
_turn = threading.Lock()
_bounds: "WeakKeyDictionary[PreTrainedTokenizerBase, _Bound]" = WeakKeyDictionary()


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, split_special_tokens: bool = False
) -> list[list[int]]:
    """Ids of each text, in one call of the tokenizer, which gives it all its threads and nothing that nobody reads."""
    if not texts:
        return []
    quiet: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False}
    settings = {"add_special_tokens": False, "split_special_tokens": split_special_tokens, **quiet}
    return tokenized(tokenizer, list(texts), **settings)["input_ids"]


def tokenized(tokenizer: "PreTrainedTokenizerBase", *texts: Any, **settings: Any) -> dict[str, Any]:
    """What a tokenizer returns of texts; whoever calls one does it here.

    One thread at a time: transformers sets whether special tokens are split on the tokenizer itself, so of two threads
    that ask for either at once, one got the ids of the other's way.
    """
    with _turn:
        return dict(tokenizer(*texts, **settings))


def most_tokens(tokenizer: "PreTrainedTokenizerBase", text: str, *, split_special_tokens: bool = False) -> int | None:
    """What the text has no more tokens than; None where nobody knows."""
    if tokenizer not in _bounds:
        _bounds[tokenizer] = _Bound(tokenizer)
    return _bounds[tokenizer].of(tokenizer, text, split_special_tokens)


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
        self._seen: dict[str, int] = {}
        self._counts: dict[str, int] = {}

    def of(self, tokenizer: "PreTrainedTokenizerBase", text: str, split_special_tokens: bool) -> int | None:
        if self._growth is None:
            return None
        if split_special_tokens or self._marks is None:
            return self._by_bytes(text)
        pieces = self._marks.split(text)
        return len(pieces) - 1 + sum(self._piece(tokenizer, piece) for piece in pieces if piece)

    def _piece(self, tokenizer: "PreTrainedTokenizerBase", piece: str) -> int:
        if piece in self._counts:
            return self._counts[piece]
        seen = self._seen.get(piece, 0) + 1
        if seen >= _OFTEN:
            self._counts[piece] = len(encode_texts(tokenizer, [piece])[0])
        for kept in (self._seen, self._counts):
            if len(kept) >= _KEPT:
                kept.clear()
        self._seen[piece] = seen
        return self._by_bytes(piece)

    def _by_bytes(self, text: str) -> int:
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
