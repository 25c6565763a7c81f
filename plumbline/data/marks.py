"""Conversations to token ids in which a text stays a text: a user who writes ``<|im_end|>`` ends no turn.

A template writes marks (special tokens) and texts into one string, where they cannot be told apart any more. So what
looks like a mark in a text is put aside before the template sees it, and is encoded as the characters that it is
written with.
"""

import copy
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from plumbline.data.counting import encode_texts, most_tokens
from plumbline.data.tokenizer import render_text, render_texts
from plumbline.errors import ModelError
from plumbline.records import Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Rendering = tuple[str, list[str]]
"""A conversation as the template writes it, with the marks in its texts put aside, and those marks."""
_NONCE = secrets.token_hex(8)  # nobody can write what stands for a mark
_marks: "WeakKeyDictionary[PreTrainedTokenizerBase, _Marks]" = WeakKeyDictionary()


def encode_turns(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    generate: bool = True,
    template_args: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation by the chat template; see `render_text`.

    Raises:
        ModelError: the template refuses the conversation.
    """
    marks = _of(tokenizer)
    turns, quoted = marks.put_aside(messages)
    text = render_text(tokenizer, turns, generate=generate, template_args=template_args)
    # a template writes the special tokens that it wants itself
    return marks.encode(text, quoted) if quoted else encode_texts(tokenizer, [text])[0]


def encode_conversations(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Sequence[Message]], *, generate: bool = True
) -> list[list[int]]:
    """`encode_turns` of several, in one call of the tokenizer for all without a mark in their texts."""
    return encode_renderings(tokenizer, renderings(tokenizer, conversations, generate=generate))


def encode_renderings(tokenizer: "PreTrainedTokenizerBase", rendered: Sequence[Rendering]) -> list[list[int]]:
    """Ids of `renderings`."""
    encoded = iter(encode_texts(tokenizer, [text for text, quoted in rendered if not quoted]))
    marks = _of(tokenizer)
    return [marks.encode(text, quoted) if quoted else next(encoded) for text, quoted in rendered]


def most_of_renderings(tokenizer: "PreTrainedTokenizerBase", rendered: Sequence[Rendering]) -> list[int | None]:
    """What none of `encode_renderings` has more tokens than, without tokenising them; None where nobody knows."""
    return [None if quoted else most_tokens(tokenizer, text) for text, quoted in rendered]


def renderings(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Sequence[Message]], *, generate: bool
) -> list[Rendering]:
    """Conversations by the chat template, each with the marks in its texts put aside.

    Raises:
        ModelError: the template refuses one of them.
    """
    asides = [put_aside(tokenizer, messages) for messages in conversations]
    texts = render_texts(tokenizer, [turns for turns, _ in asides], generate=generate)
    return [(text, quoted) for text, (_, quoted) in zip(texts, asides, strict=True)]


def put_aside(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """The turns with a numbered word in place of each mark in their texts, and those marks."""
    return _of(tokenizer).put_aside(messages)


def quotes(tokenizer: "PreTrainedTokenizerBase") -> Callable[[str], bool]:
    """Whether a text has a mark in it."""
    return _of(tokenizer).quoted


class _Marks:
    """A tokenizer's special tokens, and a copy of it that tells them from texts which look like them.

    In the copy each special token has a stand-in, which is split off where it stands as the token would be, while what
    looks like the token is left to the rest of the text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        added = tokenizer.added_tokens_decoder
        self._ids = {token.content: id for id, token in added.items() if token.special and token.content}
        self._firsts = {text[0] for text in self._ids}
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))))
        self._stand_ins = {text: _word("mark", i) for i, text in enumerate(self._ids)}
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # not the tokenizer: it is a weak key

    def put_aside(self, messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
        if not any(self.quoted(turn.content) for turn in messages):
            return list(messages), []
        quoted: list[str] = []

        def aside(found: re.Match[str]) -> str:
            quoted.append(found[0])
            return _word("quoted", len(quoted) - 1)

        return [replace(turn, content=self._pattern.sub(aside, turn.content)) for turn in messages], quoted

    def encode(self, text: str, quoted: Sequence[str]) -> list[int]:
        """Ids of a rendering: the template's marks are special tokens, what was put aside is text."""
        text = self._pattern.sub(lambda found: self._stand_ins[found[0]], text)
        text = re.sub(_word("quoted", r"(\d+)"), lambda found: quoted[int(found[1])], text)
        copied, own = self._copy
        return [own.get(id, id) for id in copied.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _copy(self) -> "tuple[Tokenizer, dict[int, int]]":
        """The copy, and the id of the token for that of its stand-in."""
        from tokenizers import AddedToken

        if self._backend is None:
            raise ModelError("a text quotes a special token, which only a tokenizer with a tokenizer.json tells apart")
        copied = copy.deepcopy(self._backend)
        copied.no_truncation()
        copied.no_padding()
        known = copied.get_added_tokens_decoder()
        for text, id in self._ids.items():
            sides = {side: getattr(known[id], side) for side in ("lstrip", "rstrip", "single_word")}
            copied.add_tokens([AddedToken(self._stand_ins[text], normalized=False, **sides)])
        copied.encode_special_tokens = True
        return copied, {copied.token_to_id(self._stand_ins[text]): id for text, id in self._ids.items()}

    def quoted(self, text: str) -> bool:
        """Without the pattern, which is slow where there are hundreds."""
        return any(first in text for first in self._firsts) and any(mark in text for mark in self._ids)


def _of(tokenizer: "PreTrainedTokenizerBase") -> _Marks:
    if tokenizer not in _marks:
        _marks[tokenizer] = _Marks(tokenizer)
    return _marks[tokenizer]


def _word(kind: str, number: int | str) -> str:
    return f"\ue000{_NONCE}{kind}{number}\ue001"
