"""Conversations to token ids: where a principle goes, what a response ends with, and tokenizers that cannot be used."""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from plumbline.data.ending import encode_response
from plumbline.data.prompting import (
    CONTRASTS,
    PRINCIPLES,
    Contrast,
    contrast,
    keeps_system,
    place_principle,
    principle_text,
    render,
    render_all,
)
from plumbline.data.tokenizer import TEMPLATES, load_tokenizer
from plumbline.errors import ConfigError, ModelError
from plumbline.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM = Message(role="system", content="Be brief.")
USER = Message(role="user", content="Why?")
ANSWER = Message(role="assistant", content="So.")
AGAIN = Message(role="user", content="Really?")

# How templates of real families treat a system turn: Gemma raises, Mistral of old dropped it.
BODY = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<e>{% endfor %}[assistant]"
RAISES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + BODY
DROPS = BODY.replace("[{{", "{% if m['role'] != 'system' %}[{{").replace("<e>", "<e>{% endif %}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character-level tokenizer with EOS ``<e>`` and BOS ``<s>``, as files, without a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: i for i, token in enumerate(["<s>", "<e>", *sorted(alphabet)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<e>").save_pretrained(path)
    return path


@pytest.fixture
def tokenizer(directory: Path, tmp_path: Path, request: pytest.FixtureRequest) -> "PreTrainedTokenizerBase":
    """The tokenizer with the template that the test names by an indirect parameter, BODY without one."""
    file = tmp_path / "template.jinja"
    file.write_text(getattr(request, "param", BODY))
    return load_tokenizer(str(directory), str(file))


# Rendering


def test_the_system_turn_takes_the_principle(tokenizer: "PreTrainedTokenizerBase") -> None:
    assert keeps_system(tokenizer)
    assert tokenizer.decode(render(tokenizer, [USER])) == "[user]Why?<e>[assistant]"
    assert tokenizer.decode(render(tokenizer, [USER], principle="Be kind.")) == (
        "[system]Be kind.<e>[user]Why?<e>[assistant]"
    )
    assert tokenizer.decode(render(tokenizer, [SYSTEM, USER], principle="Be kind.")) == (
        "[system]Be kind.\n\nBe brief.<e>[user]Why?<e>[assistant]"
    )
    assert tokenizer.decode(render(tokenizer, [SYSTEM, USER])) == "[system]Be brief.<e>[user]Why?<e>[assistant]"


@pytest.mark.parametrize("tokenizer", [RAISES, DROPS], ids=["raises", "drops"], indirect=True)
def test_without_a_system_turn_the_principle_goes_before_the_last_query(tokenizer: "PreTrainedTokenizerBase") -> None:
    assert not keeps_system(tokenizer)
    assert tokenizer.decode(render(tokenizer, [USER, ANSWER, AGAIN], principle="Be kind.")) == (
        "[user]Why?<e>[assistant]So.<e>[user]Be kind.\n\nReally?<e>[assistant]"
    )


@pytest.mark.parametrize("tokenizer", [RAISES, DROPS], ids=["raises", "drops"], indirect=True)
def test_without_a_system_turn_a_datasets_own_is_not_lost(tokenizer: "PreTrainedTokenizerBase") -> None:
    assert tokenizer.decode(render(tokenizer, [SYSTEM, USER, ANSWER, AGAIN], principle="Be kind.")) == (
        "[user]Be brief.\n\nWhy?<e>[assistant]So.<e>[user]Be kind.\n\nReally?<e>[assistant]"
    )
    assert [turn.content for turn in place_principle(tokenizer, [SYSTEM, USER], "Be kind.")] == [
        "Be kind.\n\nBe brief.\n\nWhy?"
    ]


def test_placing_leaves_the_conversation_as_it_was(tokenizer: "PreTrainedTokenizerBase") -> None:
    turns = [SYSTEM, USER]
    assert place_principle(tokenizer, turns, None) == turns
    place_principle(tokenizer, turns, "Be kind.")
    assert turns == [SYSTEM, USER]


def test_many_are_rendered_as_one_by_one(tokenizer: "PreTrainedTokenizerBase") -> None:
    asked = [([USER], None), ([SYSTEM, USER, ANSWER, AGAIN], "Be kind."), ([USER], "Be kind.")]
    one_by_one = [render(tokenizer, messages, principle=principle) for messages, principle in asked]
    assert render_all(tokenizer, asked) == one_by_one
    assert render_all(tokenizer, []) == []


def test_a_template_adds_the_only_special_tokens(directory: Path) -> None:
    for name in TEMPLATES:
        ids = render(load_tokenizer(str(directory), name), [USER])
        assert ids.count(0) == 1, f"{name}: one BOS, from the template"
        assert ids[0] == 0


def test_the_built_in_templates(directory: Path) -> None:
    turns = [SYSTEM, USER, ANSWER, AGAIN]
    chatml, plain = (load_tokenizer(str(directory), name) for name in ("chatml", "plain"))
    assert chatml.decode(render(chatml, turns)) == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>user\nReally?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert plain.decode(render(plain, turns)) == (
        "<s>Be brief.\n\nUser:\nWhy?\n\nAssistant:\nSo.<e>\n\nUser:\nReally?\n\nAssistant:\n"
    )
    assert keeps_system(chatml) and keeps_system(plain)


def test_a_conversation_that_a_template_refuses(tmp_path: Path, directory: Path) -> None:
    file = tmp_path / "strict.jinja"
    file.write_text("{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + BODY)
    tokenizer = load_tokenizer(str(directory), str(file))
    with pytest.raises(ModelError, match=r"refuses the turns \(user, assistant, user\): one turn only"):
        render(tokenizer, [USER, ANSWER, AGAIN])


# Presets


def test_principles_by_name_or_as_text() -> None:
    assert principle_text("harmless") == PRINCIPLES["harmless"]
    assert principle_text("Be kind.") == "Be kind."
    assert principle_text("要友善") == "要友善"
    with pytest.raises(ConfigError, match="did you mean 'harmless'"):
        principle_text("harmles")
    with pytest.raises(ConfigError, match="blank"):
        principle_text(" ")


def test_contrasts_by_name_with_either_side_replaced() -> None:
    assert contrast("helpful") == CONTRASTS["helpful"]
    own = contrast("helpful", negative="Be of no use.")
    assert own == Contrast(positive=CONTRASTS["helpful"].positive, negative="Be of no use.")
    assert contrast(positive="Good.", negative="Bad.") == Contrast(positive="Good.", negative="Bad.")
    with pytest.raises(ConfigError, match="did you mean 'helpful'"):
        contrast("helpfull")
    with pytest.raises(ConfigError, match="no negative side"):
        contrast(positive="Good.")
    with pytest.raises(ConfigError, match="same text"):
        contrast(positive="Good.", negative="Good.")
    assert all(pair.positive != pair.negative for pair in CONTRASTS.values())


# Loading


def refused(path: Path | str, chat_template: str | None, *parts: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(path), chat_template)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


def test_models_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path / "none", None, "none", "no such directory")
    refused(tmp_path, None, tmp_path.name, "has no tokenizer", "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{broken")
    refused(tmp_path, None, tmp_path.name, "cannot be loaded")


def test_a_tokenizer_without_eos(directory: Path, tmp_path: Path) -> None:
    config = json.loads((directory / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    refused(tmp_path, "chatml", "no EOS token", "eos_token in tokenizer_config.json")


def test_templates_that_cannot_be_used(directory: Path, tmp_path: Path) -> None:
    refused(directory, None, "no chat template", "model.chat_template", "chatml, plain")
    refused(directory, "chatm", "'chatm'", "did you mean 'chatml'")
    refused(directory, "none.jinja", "'none.jinja'", "neither a file nor a built-in name")
    file = tmp_path / "bad.jinja"
    file.write_text("{% for m in messages %}")
    refused(directory, str(file), "bad.jinja", "cannot be rendered")
    file.write_text("{{ messages[0].content.nothing() }}")
    refused(directory, str(file), "bad.jinja", "cannot be rendered")
    file.write_text("Hello.")
    refused(directory, str(file), "bad.jinja", "drops the user's turn")
    file.write_bytes(b"\xff\xfe")
    refused(directory, str(file), "bad.jinja", "not UTF-8 at byte 0")


def test_importing_is_cheap() -> None:
    code = "import sys, plumbline.data.prompting, plumbline.methods.evaluation, plumbline.data.dataset; " + (
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'pandas', 'numpy', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The real model


def test_the_real_tokenizer(shared: Path) -> None:
    path = shared / "models/comments-chat"
    if not path.is_dir():
        pytest.skip(f"no real model at {path}")
    tokenizer = load_tokenizer(str(path))
    assert keeps_system(tokenizer)
    turns = [Message(role="user", content="Comment on a product, starting with: good quality,")]
    assert tokenizer.decode(render(tokenizer, turns, principle="Write something positive.")) == (
        "<|im_start|>system\nWrite something positive.<|im_end|>\n<|im_start|>user\n"
        "Comment on a product, starting with: good quality,<|im_end|>\n<|im_start|>assistant\n"
    )
    response = encode_response(tokenizer, "good quality, many reclining positions")
    assert response[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.decode(response, skip_special_tokens=True) == "good quality, many reclining positions"
