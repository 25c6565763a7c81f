"""What a reward model reads of a conversation and an answer: the same in training and in scoring."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plumbline.data.counting import tokenized
from plumbline.data.marks import encode_conversations
from plumbline.data.tokenizer import render_text
from plumbline.records import Message, ScoreRequest

Reads = Literal["response", "pair", "conversation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardText:
    """What a sequence classifier is given: token ids, what its tokenizer returned beside them, by name, a number a
    token (`token_type_ids`, which tell a pair's query from its answer), and whether both were `cut`."""

    ids: list[int]
    beside: dict[str, list[int]]
    cut: bool


def reward_texts(tokenizer: Any, asked: Sequence[ScoreRequest], *, reads: Reads, max_len: int) -> list[RewardText]:
    """Tokenise what a reward `reads` of each, in one call of the tokenizer, cut to `max_len` tokens.

    An answer alone is cut at its end, a conversation at its beginning, so that the answer stays. What looks like a
    special token in a text is text (`plumbline.data.marks`).

    Raises:
        ModelError: the chat template refuses a conversation.
    """
    if not asked:
        return []
    if reads == "conversation":
        conversations = [_turns(one.messages, one.response) for one in asked]
        rendered = encode_conversations(tokenizer, conversations, generate=False)
        return [RewardText(ids=ids[-max_len:], beside={}, cut=len(ids) > max_len) for ids in rendered]
    answers = [one.response for one in asked]
    texts = ([one.messages[-1].content for one in asked], answers) if reads == "pair" else (answers,)
    # A tokenizer that is read from its file alone tells of a pair's segments only where it is asked.
    found = tokenized(tokenizer, *texts, split_special_tokens=True, return_token_type_ids=reads == "pair")
    all_ids = found.pop("input_ids")
    found.pop("attention_mask", None)  # there is no padding yet
    return [
        RewardText(
            ids=ids[:max_len],
            beside={name: values[i][:max_len] for name, values in found.items() if len(values[i]) == len(ids)},
            cut=len(ids) > max_len,
        )
        for i, ids in enumerate(all_ids)
    ]


def check_conversation(tokenizer: Any, messages: Sequence[Message]) -> None:
    """Raises ModelError: the chat template refuses the conversation with an answer at its end."""
    render_text(tokenizer, _turns(messages, "answer"), generate=False)


def _turns(messages: Sequence[Message], response: str) -> list[Message]:
    return [*messages, Message(role="assistant", content=response)]
