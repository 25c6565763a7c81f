"""A row as the learner sees it, token by token: its prompt, and what is learnt. `plumbline doctor` shows it."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plumbline.data.ending import encode_response
from plumbline.data.prompting import render
from plumbline.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 60
"""Tokens of each part that are shown; of a longer one its beginning and its end."""
WIDTH = 110


def example(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, steerings: Sequence[str], given: bool) -> str:
    """The tokens of a row, each between bars: its prompt, that with each of the texts put before it, and its answer.

    Args:
        given: whether the row's own answer is learnt, rather than the model's.

    Raises:
        ModelError: the chat template refuses the conversation.
    """
    parts = [("the prompt, of which nothing is learnt", render(tokenizer, prompt.messages))]
    parts += [("with what is put before it", render(tokenizer, prompt.messages, principle=one)) for one in steerings]
    answer = (prompt.target or prompt.chosen) if given else None
    if answer is not None:
        parts += [("the answer, of which every token is learnt", encode_response(tokenizer, answer))]
    return "\n".join(_shown(tokenizer, what, ids) for what, ids in parts)


def _shown(tokenizer: "PreTrainedTokenizerBase", what: str, ids: Sequence[int]) -> str:
    shown = [_text(tokenizer, one) for one in ids]
    if len(shown) > MOST:
        half = MOST // 2
        shown = [*shown[:half], f"… {len(ids) - MOST} more …", *shown[-half:]]
    lines = textwrap.wrap(
        "|" + "|".join(shown) + "|",
        WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
        drop_whitespace=False,
    )
    return "\n".join([f"  {what}: {len(ids)} tokens", *lines])


def _text(tokenizer: "PreTrainedTokenizerBase", one: int) -> str:
    """A token as text that a terminal shows as it is; a line's end is written \\n."""
    text = str(tokenizer.decode([one], skip_special_tokens=False)).replace("\n", "\\n")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
