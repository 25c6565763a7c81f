"""What doctor shows of a row: its tokens as the learner gets them, and nothing that a terminal would act upon."""

from typing import Any

import pytest

from plumbline.data.example import example
from plumbline.data.tokenizer import load_tokenizer
from plumbline.records import Message, Prompt
from tests.tiny import make_byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("bytes")
    return load_tokenizer(str(make_byte_tokenizer(directory, "<|im_end|>", "<|im_start|>")), "chatml")


def row(text: str, **answers: Any) -> Prompt:
    return Prompt(id="1", messages=(Message(role="user", content=text),), **answers)


def test_tokens_of_prompt_and_answer(tokenizer: Any) -> None:
    assert example(tokenizer, row("Hi", target="So.", chosen="No."), [], given=True).splitlines() == [
        "  the prompt, of which nothing is learnt: 21 tokens",
        "  |<|im_start|>|u|s|e|r|\\n|H|i|<|im_end|>|\\n|<|im_start|>|a|s|s|i|s|t|a|n|t|\\n|",
        "  the answer, of which every token is learnt: 4 tokens",
        "  |S|o|.|<|im_end|>|",
    ]


def test_an_answer_that_nobody_learns_is_not_shown(tokenizer: Any) -> None:
    shown = example(tokenizer, row("Hi", target="So."), ["Be kind."], given=False)
    assert "the answer" not in shown and "with what is put before it: " in shown
    assert "|B|e| |k|i|n|d|.|" in shown.replace("\n  ", "")  # as if it were one line


def test_a_long_one_is_cut_and_controls_are_written_out(tokenizer: Any) -> None:
    shown = example(tokenizer, row("\x1b[31m" + "a" * 500), [], given=False)
    assert "… 464 more" in shown and "\x1b" not in shown and "\\x1b" in shown
    assert max(map(len, shown.splitlines())) <= 110
