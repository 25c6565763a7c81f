"""The forms that rows are written in elsewhere, to ours: a conversation that ends with a user's turn, and its answers.

Read as they are: TRL's dataset types, in text and in turns (prompt-only, prompt-completion, language modelling in
turns, preferences with the prompt apart or inside of the answers, unpaired preferences), ShareGPT's `conversations`,
Alpaca's columns, and transcripts as HH has them. What has no text alone (images, tool calls) is refused.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from plumbline.data.row import Row, article, shown
from plumbline.errors import RowError
from plumbline.records import Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
"""What a turn's role may be called, and what it is."""
Target = Literal["unread", "read", "needed"]
"""What is asked of the targets: nothing, to be text or nothing (null or blank), or to be text in every row."""

_CALLS = ("tool", "function", "function_call", "function_response", "observation", "ipython")
_MEDIA = {"image", "images", "video", "videos", "audio", "audios"}
_ALPACA = ("instruction", "input", "output")
_SAID = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ ]?")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a row asks; `answer` where it goes on with the assistant's turn, `taken` the columns that are not ours,
    `pair` where the prompt was found inside of its answers."""

    messages: tuple[Message, ...]
    answer: str | None = None
    taken: tuple[str, ...] = ()
    pair: "Pair | None" = None


@dataclass(frozen=True, slots=True)
class Pair:
    """What a row prefers: `chosen` to each of `rejected`."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: tuple[str, ...]
    taken: tuple[str, ...] = ()


def read_asked(row: Row) -> Asked:
    """The conversation of a row, by `prompt` (text or turns), `messages`, or what other tools call them; where there is
    none, what `chosen` and `rejected` begin with alike. Raises RowError."""
    asked = _explicit(row)
    if asked is None:
        if not (row.has("chosen") and row.has("rejected")):
            row.missing("messages" if "messages" in row.columns else "prompt", "`prompt` or `messages`")
        pair = _implicit(row)
        asked = Asked(pair.messages, pair=pair)
    return asked


def unread_answers(row: Row, asked: Asked) -> tuple[str | None, tuple[str, ...]]:
    """`chosen` and `rejected` of a row whose preference nobody reads: as `read_pair` has them, else what is text."""
    pair = asked.pair
    if pair is None and any(isinstance(row.get(key), list) for key in ("chosen", "rejected")):
        with suppress(RowError):
            pair = read_pair(row)
    return (pair.chosen, pair.rejected) if pair else (row.unread("chosen"), row.unread_texts("rejected"))


def read_target(row: Row, asked: Asked, how: Target) -> str | None:
    """The answer to learn: `target`, else `completion`, else the assistant's turn that the conversation ends with.

    One that a row's `label` calls unwanted is none. Raises RowError.
    """
    if row.has("target") or "target" in row.columns or (asked.answer is None and not row.values.get("completion")):
        return {"unread": row.unread, "read": row.text, "needed": row.required_text}[how]("target")
    if row.values.get("label") in (False, 0, "0"):
        if how == "needed":
            row.fail("label", "is 0: this answer is no target; pick the wanted rows, as in `where: {label: 1}`")
        return None
    if asked.answer is not None:
        return asked.answer
    if how == "unread" and not isinstance(row.values["completion"], str):
        return None
    return _completion(row, asked.messages)


def read_pair(row: Row) -> Pair:
    """A row's preference. An answer is text, the assistant's turn in a list, or a whole conversation that ends with it;
    `rejected` may be a list of several. Raises RowError."""
    for key in ("chosen", "rejected"):
        if not row.has(key):
            row.missing(key, f"`{key}`")
    asked = _explicit(row)
    if asked is None:
        return _implicit(row)
    [chosen], rejected = _answers(row, "chosen"), _answers(row, "rejected")
    messages = asked.messages
    for key, (before, _) in [("chosen", chosen), *(("rejected", one) for one in rejected)]:
        if before and _without_system(before) != _without_system(messages):
            row.fail(key, "answers another conversation than the row's own; write the same turns before both answers")
        if before and len(before) > len(messages):  # with the system turn that a prompt's text has no place for
            messages = before
    return Pair(messages, chosen[1], tuple(text for _, text in rejected), asked.taken)


def read_answer(row: Row) -> tuple[str, tuple[Message, ...] | None]:
    """A labelled answer, `text` or `completion`, and what it answers where the row has that. Raises RowError."""
    asked = _explicit(row)
    messages = asked.messages if asked else None
    if not row.has("text") and "text" not in row.columns and row.values.get("completion"):
        return _completion(row, messages or ()), messages
    return row.required_text("text"), messages


def _explicit(row: Row) -> Asked | None:
    """None where the row has no conversation of its own."""
    if not _MEDIA.isdisjoint(row.values):
        _refuse_media(row)
    plain, turns = row.has("prompt"), row.has("messages")
    if plain and turns:
        if ("prompt" in row.columns) == ("messages" in row.columns):
            asked = _ended(row, "messages", _turns(row, "messages", row.get("messages")))
            if row.get("prompt") in [turn.content for turn in asked.messages if turn.role == "user"]:
                return asked
            row.fail(
                "prompt",
                "the row has `messages` too, in which no user says it; say which by `columns: {prompt: prompt}` or "
                "{messages: ...}",
            )
        plain = "prompt" in row.columns
    if plain:
        value = row.get("prompt")
        if isinstance(value, list):
            return _ended(row, "prompt", _turns(row, "prompt", value))
        return Asked((Message(role="user", content=row.checked("prompt", value)),))
    if turns:
        return _ended(row, "messages", _turns(row, "messages", row.get("messages")))
    if "prompt" in row.columns or "messages" in row.columns:
        return None
    if isinstance(row.values.get("conversations"), list):
        return _ended(row, "conversations", _turns(row, "conversations", row.values["conversations"]))
    if isinstance(row.values.get("instruction"), str):
        return _alpaca(row)
    return None


def _alpaca(row: Row) -> Asked:
    instruction, context, output = (row.values.get(name) for name in _ALPACA)
    text = row.checked("instruction", instruction)
    if isinstance(context, str) and context.strip():
        text += "\n\n" + row.checked("input", context)
    answer = row.checked("output", output) if isinstance(output, str) and output.strip() else None
    return Asked((Message(role="user", content=text),), answer, _ALPACA)


def _implicit(row: Row) -> Pair:
    """The prompt inside of both answers."""
    answers = [*_answers(row, "chosen"), *_answers(row, "rejected")]
    if not any(before for before, _ in answers):
        keys = ["chosen", *["rejected"] * (len(answers) - 1)]
        said = [_transcript(row, key, text) for key, (_, text) in zip(keys, answers, strict=True)]
        answers = [(turns[:-1], turns[-1].content) for turns in said if turns]
        if len(answers) < len(said):
            return _begun_alike(row)
    messages, chosen = answers[0]
    if not messages or any(before != messages for before, _ in answers):
        row.fail("rejected", "answers another conversation than chosen; write the same turns before both answers")
    return Pair(_asking(row, "chosen", messages), chosen, tuple(text for _, text in answers[1:]))


def _begun_alike(row: Row) -> Pair:
    """Texts that begin with the prompt, which ends with the last word that all have."""
    texts = [text for key in ("chosen", "rejected") for _, text in _answers(row, key)]
    first, last = min(texts), max(texts)  # what these two begin with alike, all do
    end = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    alike = re.match(r"(?s).*\s", first[:end])
    if alike is None or not alike[0].strip():
        row.missing("prompt", "`prompt`, and no word that chosen and rejected both begin with")
    chosen, *rejected = (text[alike.end() :] for text in texts)
    what = "after the words that both begin with "
    return Pair(
        (Message(role="user", content=alike[0].strip()),),
        row.checked("chosen", chosen, what),
        tuple(row.checked("rejected", one, what) for one in rejected),
    )


def _transcript(row: Row, key: str, text: str) -> tuple[Message, ...] | None:
    """The turns of a text that writes "Human:" and "Assistant:" before each; None where it is none."""
    empty, *pieces = _SAID.split(text)
    if empty or pieces[:1] != ["Human"]:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(role=roles[who], content=row.checked(key, said, f"turn {n} "))
        for n, (who, said) in enumerate(zip(pieces[::2], pieces[1::2], strict=True), start=1)
    )


def _answers(row: Row, key: str) -> list[tuple[tuple[Message, ...], str]]:
    """Each answer of a column, and the turns that stand before it there."""
    value = row.get(key)
    several = key == "rejected" and isinstance(value, list) and not all(isinstance(one, Mapping) for one in value)
    if isinstance(value, list) and not value:
        row.fail(key, "is an empty list; write at least one answer, or remove the row")
    listed: Sequence[object] = value if several and isinstance(value, list) else [value]
    return [_one(row, key, one, f"answer {n} " if several else "") for n, one in enumerate(listed, start=1)]


def _one(row: Row, key: str, value: object, what: str = "") -> tuple[tuple[Message, ...], str]:
    if not isinstance(value, list):
        return (), row.checked(key, value, what)
    turns = _turns(row, key, value)
    if turns[-1].role != "assistant":
        row.fail(key, f"{what}ends with a turn of the {turns[-1].role}; it should end with the assistant's")
    return turns[:-1], turns[-1].content


def _completion(row: Row, messages: Sequence[Message]) -> str:
    before, text = _one(row, "completion", row.values["completion"])
    if before and _without_system(before) != _without_system(messages):
        row.fail("completion", "goes on another conversation than the row's own; write the assistant's turn alone")
    return text


def _turns(row: Row, key: str, value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        kind = "empty" if isinstance(value, list) else article(type(value).__name__)
        row.fail(key, f"is {kind}; it should be a list of {{role, content}}, one a turn")
    return tuple(_turn(row, key, position, turn) for position, turn in enumerate(value, start=1))


def _turn(row: Row, key: str, position: int, turn: object) -> Message:
    names = ("from", "value") if isinstance(turn, Mapping) and "from" in turn else ("role", "content")
    if not isinstance(turn, Mapping) or any(name not in turn for name in names):
        has = f"has {shown(turn)}" if isinstance(turn, Mapping) else f"is {article(type(turn).__name__)}"
        row.fail(key, f"turn {position} {has}; it should have role and content")
    role, content = (turn[name] for name in names)
    if turn.get("tool_calls") or role in _CALLS:
        row.fail(key, f"turn {position} is of a tool call, and turns are text alone here; remove the row")
    known = ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        row.fail(key, f"turn {position} has the unknown role {role!r}; it should be one of system, user, assistant")
    if known == "system" and position > 1:
        row.fail(key, f"turn {position} is a system turn; only the first turn may be one")
    if isinstance(content, list):
        content = _joined(row, key, position, content)
    return Message(role=known, content=row.checked(key, content, f"content of turn {position} "))


def _joined(row: Row, key: str, position: int, parts: Sequence[object]) -> str:
    """The text of a turn that is written in parts."""
    kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in parts]
    if other := next((kind for kind in kinds if kind != "text"), None):
        row.fail(key, f"turn {position} has a part of type {other!r}, and turns are text alone here; remove the row")
    return "".join(row.checked(key, part.get("text"), f"a part of turn {position} ") for part in parts)  # type: ignore[attr-defined]


def _ended(row: Row, key: str, turns: tuple[Message, ...]) -> Asked:
    """A conversation with its answer, if it goes on with one."""
    answer = turns[-1].content if turns[-1].role == "assistant" else None
    asking = turns if answer is None else turns[:-1]
    return Asked(_asking(row, key, asking), answer, (key,) if key == "conversations" else ())


def _asking(row: Row, key: str, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    if not turns:
        row.fail(key, "is an answer that no user's turn stands before; write what it answers, or remove the row")
    if turns[-1].role != "user":
        row.fail(key, f"ends with a turn of the {turns[-1].role} before any answer; it should end with the user's")
    return turns


def _without_system(turns: Sequence[Message]) -> list[Message]:
    return [turn for turn in turns if turn.role != "system"]


def _refuse_media(row: Row) -> None:
    for name in sorted(_MEDIA & set(row.values)):
        value = row.values[name]
        if value is not None and not isinstance(value, str | int | float) and value not in ([], {}):
            row.fail(name, "is of no text, and methods learn on texts alone; remove the column or the row")
