"""What a reward model reads of a conversation and an answer: the same in training and in scoring."""

from collections.abc import Sequence
from typing import Any, Literal

from plumbline.data.marks import encode_turns
from plumbline.records import Message

Reads = Literal["response", "pair", "conversation"]


def reward_ids(
    tokenizer: Any, messages: Sequence[Message], response: str, *, reads: Reads, max_len: int
) -> tuple[list[int], bool]:
    """Token ids that a sequence classifier is given, and whether they were cut to `max_len`.

    An answer alone is cut at its end, a conversation at its beginning, so that the answer stays. What looks like a
    special token in a text is text (`plumbline.data.marks`).

    Raises:
        ModelError: the chat template refuses the conversation.
    """
    if reads == "conversation":
        turns = [*messages, Message(role="assistant", content=response)]
        ids = encode_turns(tokenizer, turns, generate=False)
        return ids[-max_len:], len(ids) > max_len
    texts = (messages[-1].content, response) if reads == "pair" else (response,)
    ids = tokenizer(*texts, split_special_tokens=True)["input_ids"]
    return ids[:max_len], len(ids) > max_len
