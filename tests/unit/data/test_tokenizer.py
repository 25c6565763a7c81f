"""One reading of a tokenizer, what transformers makes of the same files, and what a template is given."""

import json
from pathlib import Path

import pytest

from plumbline.data.marks import encode_turns
from plumbline.data.tokenizer import TEMPLATES, load_tokenizer, read_tokenizer, render_text, template_variables
from plumbline.data.tokenizer_check import check_readings, check_thoughts
from plumbline.errors import DataError, ModelError
from plumbline.records import Message, Prompt
from tests.tiny import make_byte_tokenizer

USER = (Message(role="user", content="Why?"),)
THINKS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n"
    "{% if enable_thinking is defined and enable_thinking is false %}\n</think>\n\n{% endif %}{% endif %}"
)


def model(directory: Path, kind: str | None, architecture: str) -> Path:
    make_byte_tokenizer(directory, "<e>", "<s>", tokenizer_class=kind)
    (directory / "config.json").write_text(json.dumps({"model_type": architecture, "eos_token_id": 0}))
    return directory


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", None])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_ids_are_the_files_whatever_class_is_declared(tmp_path: Path, kind: str | None, architecture: str) -> None:
    from tokenizers import Tokenizer

    directory = model(tmp_path / "model", kind, architecture)
    file, read = Tokenizer.from_file(str(directory / "tokenizer.json")), read_tokenizer(str(directory))
    for text in ("  don't\n\n\tx = 12345", "naïve café 東京 🙂", " leading"):
        ids = read.encode(text, add_special_tokens=False)
        assert ids == file.encode(text, add_special_tokens=False).ids
        assert read.decode(ids) == text


def test_another_reading_is_refused_with_what_to_write(tmp_path: Path) -> None:
    directory = model(tmp_path / "model", "LlamaTokenizerFast", "llama")
    with pytest.raises(ModelError) as caught:
        check_readings(str(directory))
    line = str(caught.value)
    assert "tokenizer_class LlamaTokenizerFast" in line and "PreTrainedTokenizerFast in tokenizer_config.json" in line
    assert "\n" not in line
    agreed = check_readings(str(model(tmp_path / "said", "PreTrainedTokenizerFast", "llama")))
    assert agreed.endswith("texts, read by transformers as by tokenizer.json") and int(agreed.split()[0]) > 300


def test_where_no_file_of_the_models_helps_it_is_only_told(tmp_path: Path) -> None:
    """Transformers gives some architectures their own tokenizer whatever class is declared."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<e>", "<unk>", "a"])}
    backend = Tokenizer(models.WordLevel(vocab=words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", unk_token="<unk>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert "load an exported model's with PreTrainedTokenizerFast" in check_readings(str(tmp_path))


def test_a_template_is_given_its_arguments_by_all_who_render(tmp_path: Path) -> None:
    directory = make_byte_tokenizer(tmp_path / "model", "<e>")
    (tmp_path / "thinks.jinja").write_text("\n" + THINKS)
    path = str(tmp_path / "thinks.jinja")
    plain = load_tokenizer(str(directory), path)
    given = load_tokenizer(str(directory), path, {"enable_thinking": False})
    assert render_text(plain, USER) == "\n[user]Why?<e>[assistant]<think>\n"
    assert render_text(given, USER) == "\n[user]Why?<e>[assistant]<think>\n</think>\n\n"
    assert render_text(given, USER, template_args={"enable_thinking": True}) == render_text(plain, USER)
    assert encode_turns(given, USER, template_args={"enable_thinking": True}) == encode_turns(plain, USER)
    given.save_pretrained(tmp_path / "exported")  # so an exported model renders as it was trained
    exported = load_tokenizer(str(tmp_path / "exported"), None, {"enable_thinking": False})
    assert exported.chat_template == given.chat_template
    assert template_variables(THINKS) == ["enable_thinking"] and template_variables(TEMPLATES["chatml"]) == []


@pytest.mark.parametrize("value", [True, 3, 0.5, "a 'b' \"c\" %} 🙂"])
def test_any_value_reaches_a_template(tmp_path: Path, value: object) -> None:
    directory = make_byte_tokenizer(tmp_path / "model", "<e>")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{{ x }}{% endfor %}")
    tokenizer = load_tokenizer(str(directory), str(tmp_path / "t.jinja"), {"x": value})
    assert render_text(tokenizer, USER) == f"Why?{value}"


def test_an_argument_that_the_template_does_not_read(tmp_path: Path) -> None:
    directory = make_byte_tokenizer(tmp_path / "model", "<e>")
    (tmp_path / "thinks.jinja").write_text(THINKS)
    with pytest.raises(ModelError, match=r"model\.template_args: enable_thinkin .* did you mean 'enable_thinking'"):
        load_tokenizer(str(directory), str(tmp_path / "thinks.jinja"), {"enable_thinkin": False})
    with pytest.raises(ModelError, match=r"there are none"):
        load_tokenizer(str(directory), "chatml", {"enable_thinking": False})


def test_answers_that_would_land_in_a_thought(tmp_path: Path) -> None:
    directory = make_byte_tokenizer(tmp_path / "model", "<e>")
    (tmp_path / "thinks.jinja").write_text(THINKS)
    path = str(tmp_path / "thinks.jinja")
    rows = [Prompt(id="1", messages=USER, target="I think.</think>So."), Prompt(id="2", messages=USER, target="So.")]
    check_thoughts(load_tokenizer(str(directory), path), "rows", rows[:1])
    check_thoughts(load_tokenizer(str(directory), path, {"enable_thinking": False}), "rows", rows)
    with pytest.raises(DataError) as caught:
        check_thoughts(load_tokenizer(str(directory), path), "rows", rows)
    line = str(caught.value)
    assert "row 2" in line and "model.template_args: {enable_thinking: false}" in line and "\n" not in line
