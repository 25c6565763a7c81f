"""What an engine reads and what it has vLLM read: one tokenizer, and all that ends an answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.engines.tokens import EngineTokens
from plumbline.data.tokenizer import TEMPLATES
from plumbline.errors import ModelError
from plumbline.records import Message
from tests.tiny import engine_spec, make_byte_tokenizer

MARKS = ("<|text|>", "<|im_end|>", "<|im_start|>")
TEXTS = ("Hello there", "  don't\n\n\tx = 12345", "naïve café 東京 🙂", "a<|im_end|>b")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tokenizer as some Qwen2 models have it: a class and an architecture that make another one of its file."""
    directory = make_byte_tokenizer(tmp_path / "model", *MARKS, tokenizer_class="LlamaTokenizerFast")
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 0}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1], "temperature": 0.6}))
    return directory


def test_vllm_is_given_the_same_ids_and_ends(model: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, GenerationConfig

    tokens = EngineTokens(engine_spec(model, chat_template=TEMPLATES["chatml"]))
    tokens.write(tmp_path / "written")
    read: Any = AutoTokenizer.from_pretrained(tmp_path / "written")  # as vLLM does
    file = Tokenizer.from_file(str(model / "tokenizer.json"))
    for text in TEXTS:
        said = file.encode(text, add_special_tokens=False).ids
        assert read.encode(text, add_special_tokens=False) == said
        assert tokens.tokenizer.encode(text, add_special_tokens=False) == said
    assert read.get_chat_template() == TEMPLATES["chatml"]
    settings = GenerationConfig.from_pretrained(tmp_path / "written")
    assert (settings.eos_token_id, settings.temperature) == ([0, 1], 0.6)


def test_a_tokenizer_beside_the_model_is_the_one_that_is_read(model: Path, tmp_path: Path) -> None:
    other = make_byte_tokenizer(tmp_path / "other", *MARKS, "<|more|>")
    tokens = EngineTokens(engine_spec(model, tokenizer_path=str(other)))
    assert len(tokens.tokenizer) == len(EngineTokens(engine_spec(model)).tokenizer) + 1


def test_an_answer_ends_at_any_of_them(model: Path) -> None:
    tokens = EngineTokens(engine_spec(model, chat_template=TEMPLATES["chatml"]))
    assert [tokens.ends([50, id], ()) for id in (0, 1, 2)] == [True, True, False]
    dot = tokens.tokenizer.encode("so.", add_special_tokens=False)
    assert tokens.ends(dot, (".",)) and not tokens.ends(dot[:-1], (".",))
    assert [tokens.completion([50, id], (), stopped=True).ids for id in (0, 1)] == [[50, 1]] * 2


def test_users_are_read_as_the_run_reads(model: Path) -> None:
    turns = [Message(role="user", content="<|im_end|>")]
    tokens = EngineTokens(engine_spec(model, chat_template=TEMPLATES["chatml"]))
    assert tokens.prompt(turns, {}).count(1) == 1
    strict = EngineTokens(engine_spec(model, chat_template="{{ raise_exception('no') }}"))
    with pytest.raises(ModelError, match=r"refuses the turns \(user\): no"):
        strict.prompt(turns, {})
    with pytest.raises(ModelError, match="no chat template"):
        EngineTokens(engine_spec(model)).prompt(turns, {})


def test_what_a_user_gives_the_template(model: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if think | default(true) %}T{% endif %}"
    tokens = EngineTokens(engine_spec(model, chat_template=template))
    turns = [Message(role="user", content="x")]
    assert tokens.template_variables() == ["think"]
    assert len(tokens.prompt(turns, {})) == 2 and len(tokens.prompt(turns, {"think": False})) == 1
