"""Conversations to token ids: where a principle goes, and our own wording of principles and contrasts.

Called by the pipelines for every prompt, by the miniature and by evaluation.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plumbline.config.pipelines import Contrasts, Dlma, MethodSection
from plumbline.data.marks import encode_conversations, encode_turns, most_of_conversations
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
    return encode_conversations(
        tokenizer, [place_principle(tokenizer, messages, principle) for messages, principle in asked]
    )


def most_of_all(
    tokenizer: "PreTrainedTokenizerBase", asked: Sequence[tuple[Sequence[Message], str | None]]
) -> list[int | None]:
    """What none of `render_all` has more tokens than, without tokenising them; None where nobody knows.

    Raises:
        ModelError: as `render_all`.
    """
    return most_of_conversations(
        tokenizer, [place_principle(tokenizer, messages, principle) for messages, principle in asked]
    )


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
    if principle is None and system is None:
        return turns
    if keeps_system(tokenizer):
        content = "\n\n".join(text for text in (principle, system) if text)
        return [Message(role="system", content=content), *turns]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise ModelError("the chat template has no system turn, and there is no user's turn that its text could go to")
    for index, text in ((first, system), (len(turns) - 1, principle)):
        if text:
            turns[index] = Message(role=turns[index].role, content=f"{text}\n\n{turns[index].content}")
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


def _names(presets: Mapping[str, object]) -> str:
    return ", ".join(presets)
