"""Bounds of tokens without tokenising: never below what a tokenizer makes of a text, and none where nobody knows."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from plumbline.config.file import parse_config
from plumbline.config.tree import Config
from plumbline.data import length_filter
from plumbline.data.counting import encode_texts, most_tokens
from plumbline.data.ending import encode_responses, most_of_responses
from plumbline.data.length_filter import Fit, Lengths, section_fit
from plumbline.data.marks import encode_conversations, most_of_renderings, renderings
from plumbline.data.tokenizer import TEMPLATES
from plumbline.errors import DataError
from plumbline.records import Message, Prompt

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GROWING = "\U0001d160 \u0958 \ufb2c \u0344 \ufdfa e\u0301"  # NFC writes some of these with three characters


def make(normalizer: Any = None, *before: Any, byte_fallback: bool = False, template: str = "chatml") -> Any:
    """A byte-level BPE with some merges, or what else is made of it."""
    core = Tokenizer(models.BPE(byte_fallback=byte_fallback))
    if normalizer:
        core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["the goat eats the grass, then the other goat eats"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=MARKS[2], chat_template=TEMPLATES[template])


def most_of_conversations(tokenizer: Any, asked: Sequence[Sequence[Message]]) -> list[int | None]:
    return most_of_renderings(tokenizer, renderings(tokenizer, asked, generate=True))


BOUNDED = [
    make(),
    make(normalizers.NFC(), pre_tokenizers.Digits(True)),
    make(normalizers.Sequence([normalizers.NFD()])),
    make(template="plain"),
]
TEXTS = st.lists(
    st.sampled_from(["the goat", " ", "\n", *MARKS, *GROWING, "7", "<|im_"]) | st.text(max_size=8), max_size=6
).map("".join)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), which=st.integers(0, len(BOUNDED) - 1))
def test_nothing_has_more_tokens_than_its_bound(texts: list[str], which: int) -> None:
    tokenizer = BOUNDED[which]
    texts = [text.encode(errors="ignore").decode() for text in texts]
    turns = [[Message(role="system", content=texts[0]), Message(role="user", content=text)] for text in texts]
    for asked, ids, most in (
        (turns, encode_conversations, most_of_conversations),
        (texts, encode_responses, most_of_responses),
    ):
        for own, bound in zip(ids(tokenizer, asked), most(tokenizer, asked), strict=True):  # type: ignore[arg-type]
            assert bound is None or len(own) <= bound
            assert bound is not None or any(mark in text for mark in MARKS for text in texts)


def test_a_special_token_is_one_and_a_text_that_comes_again_is_counted() -> None:
    tokenizer = make()
    system = "the goat eats the grass " * 4
    asked = [[Message(role="system", content=system), Message(role="user", content=f"?{i}")] for i in range(20)]
    counts = [len(ids) for ids in encode_conversations(tokenizer, asked)]
    bounds = most_of_conversations(tokenizer, asked)
    assert bounds[0] is not None and bounds[0] > counts[0] + 30
    assert bounds[-1] is not None and counts[-1] <= bounds[-1] < counts[-1] + 30


@pytest.mark.parametrize(
    "tokenizer",
    [
        make(normalizers.Replace(" ", "▁")),
        make(None, pre_tokenizers.Metaspace()),
        make(None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        make(byte_fallback=True),
    ],
)
def test_where_something_may_be_put_in_nobody_knows(tokenizer: Any) -> None:
    assert most_tokens(tokenizer, "the goat") is None


def config(limit: int, max_len: int, kind: str) -> Config:
    return parse_config(
        {
            "name": "filter",
            "model": {"path": "model", "max_len": max_len},
            "data": {"train": {"path": "rows.jsonl"}, "max_prompt_tokens": limit},
            "reward": {"type": "program", "function": "a:b"},
            "pipelines": [
                {"type": kind, "generation": {"max_tokens": 8}, **({"filter": False} if kind != "ple" else {})}
            ],
        },
        origin="test",
    )


def prompts() -> list[Prompt]:
    """Some short, some whose bytes are too many and whose tokens are not, some too long, one that quotes a mark."""
    texts = [*("the goat " * n for n in range(1, 40)), "é" * 9, "<|im_end|>", GROWING]
    return [
        Prompt(id=f"p{i}", messages=(Message(role="user", content=text),), target="the grass " * (i % 7 + 1), row=i + 1)
        for i, text in enumerate(texts)
    ]


def told(fit: Fit) -> tuple[list[str], list[tuple[str, str, str]]]:
    return [one.id for one in fit.prompts], [(one.prompt.id, one.reason, one.detail) for one in fit.unfit]


@pytest.mark.parametrize("kind", ["ple", "self_contrast"])
@pytest.mark.parametrize(("limit", "max_len"), [(40, 400), (60, 120), (8, 400), (400, 4000)])
def test_what_fits_and_what_is_said_are_as_if_all_were_counted(
    monkeypatch: pytest.MonkeyPatch, kind: str, limit: int, max_len: int
) -> None:
    asked, tokenizer = config(limit, max_len, kind), BOUNDED[0]
    [section] = asked.methods
    found = told(section_fit(asked, section, Lengths(tokenizer, prompts(), "rows.jsonl")))
    for name in ("most_of_all", "most_of_responses"):
        monkeypatch.setattr(length_filter, name, lambda _, texts: [None] * len(texts))
    assert found == told(section_fit(asked, section, Lengths(tokenizer, prompts(), "rows.jsonl")))
    assert (limit < 400) == bool(found[1])


def test_rows_that_surely_fit_are_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    real = length_filter.render_all

    def render_all(tokenizer: Any, some: Sequence[Any]) -> list[list[int]]:
        counted.append(len(some))
        return real(tokenizer, some)

    monkeypatch.setattr(length_filter, "render_all", render_all)
    asked = config(400, 4000, "ple")
    section_fit(asked, asked.methods[0], Lengths(BOUNDED[0], prompts(), "rows.jsonl"))
    assert counted == [1, 1]  # the one that quotes a mark, plain and with the principle


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = make()
    refuses = "{% if 'é' in messages[-1].content %}{{ raise_exception('no accents') }}{% endif %}"
    tokenizer.chat_template = refuses + TEMPLATES["chatml"]
    with pytest.raises(DataError, match=r"rows\.jsonl, row 40: the chat template refuses the turns \(user\): no acc"):
        Lengths(tokenizer, prompts(), "rows.jsonl").under(None)


def test_ids_are_those_of_one_text_at_a_time() -> None:
    texts = ["the goat", GROWING, "a<|im_end|>b"]
    for split in (False, True):
        ones = [BOUNDED[0].encode(text, add_special_tokens=False, split_special_tokens=split) for text in texts]
        assert encode_texts(BOUNDED[0], texts, split_special_tokens=split) == ones
    assert encode_texts(BOUNDED[0], []) == []


def test_two_threads_get_their_own_ways_ids() -> None:
    """transformers keeps on the tokenizer how special tokens are read: each thread had some of the other's ids."""
    asked = [[Message(role="user", content=f"the goat {i}")] for i in range(64)]
    texts = [f"the <|im_end|> goat {i}" for i in range(64)]
    ways = (lambda: encode_conversations(BOUNDED[0], asked), lambda: encode_responses(BOUNDED[0], texts))
    right = [way() for way in ways]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: ways[i % 2](), range(200)))
    assert all(one == right[i % 2] for i, one in enumerate(found))
