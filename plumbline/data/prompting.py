"""Conversations to token ids: where a principle goes, and our own wording of principles and contrasts.

Called by the pipelines for every prompt, by the miniature and by evaluation.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from plumbline.config.pipelines import Contrasts, Dlma, MethodSection
from plumbline.data.counting import Often, most_around, most_bytes
from plumbline.data.frames import Frame, Unread, find_frame, unread
from plumbline.data.marks import (
    Rendering,
    encode_renderings,
    encode_turns,
    most_of_renderings,
    put_aside,
    quotes,
    renderings,
)
from plumbline.data.tokenizer import nearest, render_text
from plumbline.errors import ConfigError, ModelError
from plumbline.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """A wanted quality and its opposite, each said as a short principle: DLMA's p+ and p- (METHODS.md §1)."""

    positive: str
    negative: str


PRINCIPLES: Mapping[str, str] = {
    "harmless": (
        "Answer by these rules. Be ethical: take no part in harm, crime, hatred or deceit, and say so politely when "
        "asked to. Be informative: give correct facts and name the reasons for them. Be helpful: find the honest need "
        "behind the question and serve it."
    ),
    "positive": (
        "Write something positive. Praise what is good, with enthusiasm and warmth, and sound sincere: name particular "
        "things that you liked."
    ),
    "faithful_summary": (
        "Summarise by these rules. Be concise: one or two sentences with the main point first. Be faithful: say only "
        "what the text says, and leave out nothing that changes its meaning."
    ),
}

CONTRASTS: Mapping[str, Contrast] = {
    "harmless": Contrast(
        positive="Give a lawful, ethical and inoffensive answer.",
        negative="Give an unlawful, unethical and offensive answer.",
    ),
    "helpful": Contrast(
        positive="Give a helpful, informative and relevant answer.",
        negative="Give an unhelpful, uninformative and irrelevant answer.",
    ),
    "positive": Contrast(positive="Write something positive.", negative="Write something negative."),
}

# Not words of any template, so that finding them in a rendering means that the template kept them.
_SYSTEM_MARK, _USER_MARK = "plumbsystemline", "plumbuserline"
_keeps_system: dict[str, bool] = {}
_KEPT = 1024
_shapes: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Often, _Shapes]]" = WeakKeyDictionary()


def principle_text(name_or_text: str) -> str:
    """The principle itself: a preset of `PRINCIPLES` by name, any other text as it is.

    Raises:
        ConfigError: blank, or one bare word that names no preset (a misspelt name would else become the principle).
    """
    if name_or_text in PRINCIPLES:
        return PRINCIPLES[name_or_text]
    if not name_or_text.strip():
        raise ConfigError(f"the principle is blank: write one, or name a preset: {_names(PRINCIPLES)}")
    if re.fullmatch(r"[A-Za-z0-9_\-]+", name_or_text):
        raise ConfigError(f"principle {name_or_text!r} is no preset{nearest(name_or_text, PRINCIPLES)}")
    return name_or_text


def contrast(name: str | None = None, *, positive: str | None = None, negative: str | None = None) -> Contrast:
    """A preset of `CONTRASTS` by name, either side of which may be replaced; without a name both sides are needed.

    Raises:
        ConfigError: an unknown name, a missing or blank side, or two sides that say the same.
    """
    if name is not None and name not in CONTRASTS:
        raise ConfigError(f"contrast {name!r} is no preset{nearest(name, CONTRASTS)}")
    preset = CONTRASTS[name] if name is not None else Contrast(positive="", negative="")
    pair = Contrast(
        positive=preset.positive if positive is None else positive,
        negative=preset.negative if negative is None else negative,
    )
    for side in ("positive", "negative"):
        if not getattr(pair, side).strip():
            raise ConfigError(f"the contrast has no {side} side: write one, or name a preset: {_names(CONTRASTS)}")
    if pair.positive == pair.negative:
        raise ConfigError("the contrast's two sides are the same text: every self-reward would be 0; make them differ")
    return pair


def render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, principle: str | None = None
) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins (METHODS.md §0: prompt and response apart).

    Args:
        principle: placed by `place_principle`; None for the plain prompt, which all log-probs and rewards use.

    Raises:
        ModelError: the chat template refuses the conversation.
    """
    return encode_turns(tokenizer, place_principle(tokenizer, messages, principle))


def render_all(
    tokenizer: "PreTrainedTokenizerBase", asked: Sequence[tuple[Sequence[Message], str | None]]
) -> list[list[int]]:
    """`render` of conversations with their principles in one call of the tokenizer.

    Each call lets go of the interpreter's lock, and a busy process is slow to get it back.

    Raises:
        ModelError: the chat template refuses one of them.
    """
    return encode_renderings(tokenizer, _renderings(tokenizer, asked))


def most_of_all(
    tokenizer: "PreTrainedTokenizerBase", asked: Sequence[tuple[Sequence[Message], str | None]]
) -> list[int | None]:
    """What none of `render_all` has more tokens than, without tokenising them; None where nobody knows.

    Raises:
        ModelError: as `render_all`.
    """
    most, quoted = most_bytes(tokenizer), quotes(tokenizer)
    bounds: list[int | None] = []
    others: dict[int, list[Message]] = {}
    for messages, principle in asked:
        shape = _shape(tokenizer, messages, principle)
        if shape is None or shape.most is None:
            others[len(bounds)] = place_principle(tokenizer, messages, principle)
            bounds.append(None)
        elif any(quoted(turn.content) for turn in messages):
            bounds.append(None)
        else:
            bounds.append(shape.most + sum(most(messages[turn].content) for turn in shape.frame.turns))
    rendered = renderings(tokenizer, list(others.values()), generate=True)
    for i, bound in zip(others, most_of_renderings(tokenizer, rendered), strict=True):
        bounds[i] = bound
    return bounds


def _renderings(
    tokenizer: "PreTrainedTokenizerBase", asked: Sequence[tuple[Sequence[Message], str | None]]
) -> list[Rendering]:
    written: list[Rendering] = []
    others: dict[int, list[Message]] = {}
    for messages, principle in asked:
        shape = _shape(tokenizer, messages, principle)
        if shape is None:
            others[len(written)] = place_principle(tokenizer, messages, principle)
            written.append(("", []))
        else:
            turns, quoted = put_aside(tokenizer, messages)
            written.append((shape.frame.around([turn.content for turn in turns]), quoted))
    for i, one in zip(others, renderings(tokenizer, list(others.values()), generate=True), strict=True):
        written[i] = one
    return written


@dataclass(frozen=True, slots=True)
class _Shape:
    """The frame of all conversations of some roles with a principle, and perhaps a system turn that all of them have,
    and what it has no more tokens than."""

    frame: Frame
    most: int | None


_Shapes = dict[tuple[str | None, ...], _Shape | None]


def _shape(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], principle: str | None) -> _Shape | None:
    """None where each conversation is to be rendered."""
    often, known = _shapes.setdefault(tokenizer, (Often(), {}))
    first = messages[0] if messages else None
    own = first.content if first and first.role == "system" and often(first.content) else None
    key = (tokenizer.get_chat_template(), principle, own, *[turn.role for turn in messages])
    if key in known:
        return known[key]
    turns = unread([turn.role for turn in messages])
    found = _found(tokenizer, turns if own is None else [*messages[:1], *turns[1:]], principle)
    if len(known) < _KEPT:
        known[key] = found
    return found


def _found(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Message], principle: str | None) -> _Shape | None:
    given = [principle or "", *(turn.content for turn in turns if not isinstance(turn.content, Unread))]
    if any(map(quotes(tokenizer), given)):
        return None
    try:
        frame = find_frame(tokenizer, place_principle(tokenizer, turns, principle))
    except ModelError:  # as it says of each row
        return None
    return None if frame is None else _Shape(frame, most_around(tokenizer, frame.between))


def steerings(section: MethodSection) -> list[str]:
    """What a method puts before its prompts: PLE's principle, DLMA's contrasts. Raises ConfigError."""
    if isinstance(section, Dlma):
        pairs = (dlma_contrast(section.contrast), dlma_contrast(section.scoring or section.contrast))
        return [side for pair in pairs for side in (pair.positive, pair.negative)]
    return [principle_text(section.principle)] if section.type == "ple" else []


def dlma_contrast(settings: Contrasts) -> Contrast:
    """Both sides, presets filled in. Raises ConfigError."""
    return contrast(settings.preset, positive=settings.positive, negative=settings.negative)


def place_principle(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], principle: str | None
) -> list[Message]:
    """The conversation with `principle` in it: in the system turn where the template keeps one, before any system text
    that is there already, else before the last query (METHODS.md §3).

    A template without a system turn would drop or refuse a dataset's own one: its text moves before the first query.

    Raises:
        ModelError: there is no query to put a system text before.
    """
    turns = list(messages)
    system = turns.pop(0).content if turns and turns[0].role == "system" else None
    texts = [text for text in (principle, system) if text is not None]
    if not texts:
        return turns
    if keeps_system(tokenizer):
        return [Message(role="system", content=reduce(_above, texts)), *turns]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise ModelError("the chat template has no system turn, and there is no user's turn that its text could go to")
    for index, text in ((first, system), (len(turns) - 1, principle)):
        if text is not None:
            turns[index] = Message(role=turns[index].role, content=_above(text, turns[index].content))
    return turns


def keeps_system(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template has a system turn, found by rendering one: it neither raises nor drops its text."""
    template = tokenizer.get_chat_template()
    if template not in _keeps_system:
        turns = [Message(role="system", content=_SYSTEM_MARK), Message(role="user", content=_USER_MARK)]
        try:
            text = render_text(tokenizer, turns)
        except ModelError:
            text = ""
        _keeps_system[template] = _SYSTEM_MARK in text and _USER_MARK in text
    return _keeps_system[template]


def _above(text: str, other: str) -> str:
    return text + "\n\n" + other  # by +, which an `Unread` text bears


def _names(presets: Mapping[str, object]) -> str:
    return ", ".join(presets)
