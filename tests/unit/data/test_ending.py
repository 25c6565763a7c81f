"""How a turn ends: the tokens that end an answer, the one that a target ends with, and what becomes of a sample."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from plumbline.data.ending import completion, decode, encode_response, end_ids, strip_stop, turn_end
from plumbline.data.tokenizer import load_tokenizer, read_tokenizer
from plumbline.errors import ModelError
from tests.tiny import make_byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT, TURN, START, PAD = range(4)
MARKS = ("<|text|>", "<|im_end|>", "<|im_start|>", "<|pad|>")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EOS is the first of `MARKS`, as base models have it; ChatML ends a turn with the second."""
    return make_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), *MARKS)


@pytest.fixture(scope="module")
def chatml(directory: Path) -> "PreTrainedTokenizerBase":
    return load_tokenizer(str(directory), "chatml")


def test_a_target_ends_as_the_template_ends_a_turn(chatml: "PreTrainedTokenizerBase", directory: Path) -> None:
    assert chatml.eos_token_id == TEXT
    assert turn_end(chatml) == encode_response(chatml, "So.")[-1] == TURN
    assert turn_end(load_tokenizer(str(directory), "plain")) == TEXT  # which writes EOS


@pytest.mark.parametrize(
    ("tail", "end"),
    [
        ("<|im_end|>", TURN),
        (" <|text|>", TEXT),  # Llama 2's has a space before it
        ("<|pad|>\n{% if not add_generation_prompt %}<|im_end|>{% endif %}", PAD),  # Phi 3's has two
        ("\n\n", TEXT),  # nothing: EOS
        ("</s>", TEXT),  # no token of this tokenizer
    ],
)
def test_what_templates_write_behind_an_answer(directory: Path, tmp_path: Path, tail: str, end: int) -> None:
    (tmp_path / "own.jinja").write_text(
        "<|im_start|>{% for m in messages %}{{ m.role }}: {{ m.content }}" + tail + "{% endfor %}assistant:"
        if "generation" not in tail
        else "<|im_start|>{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}" + tail
    )
    assert turn_end(load_tokenizer(str(directory), str(tmp_path / "own.jinja"))) == end


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, [TEXT, TURN]),
        ({"generation_config.json": {"eos_token_id": PAD}}, [TEXT, TURN, PAD]),
        ({"generation_config.json": {"eos_token_id": [PAD, TURN]}}, [TEXT, TURN, PAD]),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": PAD}}, [TEXT, TURN, PAD]),
        ({"generation_config.json": {"eos_token_id": TEXT}, "config.json": {"eos_token_id": PAD}}, [TEXT, TURN]),
        ({"config.json": {"text_config": {"eos_token_id": PAD}}}, [TEXT, TURN, PAD]),
        ({"config.json": {"eos_token_id": 100}}, [TEXT, TURN]),  # a byte: an architecture's default, no end here
        ({"config.json": {"eos_token_id": 50256}}, [TEXT, TURN]),
    ],
)
def test_all_that_ends_an_answer(
    chatml: "PreTrainedTokenizerBase", tmp_path: Path, files: dict[str, object], ends: list[int]
) -> None:
    for name, settings in files.items():
        (tmp_path / name).write_text(json.dumps(settings))
    assert end_ids(chatml, str(tmp_path)) == ends


def test_a_damaged_file_is_named(chatml: "PreTrainedTokenizerBase", tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"generation_config\.json: not a JSON object"):
        end_ids(chatml, str(tmp_path))


def test_without_a_template_eos_ends_an_answer(directory: Path, tmp_path: Path) -> None:
    assert end_ids(read_tokenizer(str(directory)), str(tmp_path)) == [TEXT]


def test_the_end_follows_iff_the_response_ended(chatml: "PreTrainedTokenizerBase") -> None:
    cut = encode_response(chatml, "So.", ended=False)
    assert chatml.decode(cut) == "So."
    assert encode_response(chatml, "So.") == [*cut, TURN]
    assert encode_response(chatml, "", ended=False) == []


def test_a_quoted_special_token_is_text(chatml: "PreTrainedTokenizerBase") -> None:
    ids = encode_response(chatml, "a<|im_end|>b<|text|>", ended=False)
    assert not {TEXT, TURN} & set(ids)
    assert chatml.decode(ids) == "a<|im_end|>b<|text|>"


@pytest.mark.parametrize("end", [TEXT, TURN, PAD])
def test_whatever_ended_a_sample_it_ends_as_a_target(chatml: "PreTrainedTokenizerBase", end: int) -> None:
    said = encode_response(chatml, "So.", ended=False)
    made = completion(chatml, [TEXT, TURN, PAD], [*said, end], (), stopped=True)
    assert (made.text, made.ids, made.finish_reason) == ("So.", encode_response(chatml, "So."), "stop")


def test_a_sample_that_was_cut_off_has_no_end(chatml: "PreTrainedTokenizerBase") -> None:
    said = encode_response(chatml, "So", ended=False)
    made = completion(chatml, [TEXT, TURN], said, (".",), stopped=False)
    assert (made.text, made.ids, made.finish_reason) == ("So", said, "length")


def test_a_stop_string_leaves_no_trace(chatml: "PreTrainedTokenizerBase") -> None:
    said = encode_response(chatml, "It is so. END", ended=False)
    made = completion(chatml, [TEXT, TURN], said, (". END", "."), stopped=True)
    assert (made.text, made.ids) == ("It is so", encode_response(chatml, "It is so"))


def test_a_stop_string_inside_of_a_token(tmp_path: Path) -> None:
    from tests.tiny import make_tiny_model

    tokenizer = load_tokenizer(str(make_tiny_model(tmp_path / "model")))
    said = tokenizer.encode(" jagged stars", add_special_tokens=False)
    assert len(said) == 2
    made = completion(tokenizer, [2], said, ("tars",), stopped=True)
    assert made.text == " jagged s"
    assert made.ids == [*encode_response(tokenizer, " jagged s", ended=False), turn_end(tokenizer)]
    assert decode(tokenizer, made.ids[:1]) == " jagged"


def test_strip_stop_cuts_at_the_first() -> None:
    assert strip_stop("a\nHuman: b END", ("END", "\nHuman:")) == "a"
    assert strip_stop("a b ", ("END",)) == "a b "
    assert strip_stop("a b", ()) == "a b"
    assert strip_stop("a b", ("",)) == "a b"
    assert strip_stop("END a", ("END",)) == ""
