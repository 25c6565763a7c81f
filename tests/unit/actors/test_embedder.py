"""Cosines by hand with a static embedding, and what a small BERT cuts off, pools and counts."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from actors.embedder import Embedder, EmbedderSpec
from plumbline.errors import ModelError
from plumbline.records import Completion, Generation, PolicyRef

WEIGHTS = {
    "[UNK]": (0.0, 0.0),
    "east": (2.0, 0.0),
    "north": (0.0, 2.0),
    "west": (-1.0, 0.0),
    "far": (3.0, 4.0),
    "huge": (3e38, 4e38),  # past what float32 holds: 4e38 is inf
    "none": (math.nan, 0.0),
    "tiny": (3e-30, 4e-30),  # its square is 0 in float32
}


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return core


def save_static(directory: Path, tokenizer: Tokenizer) -> Path:
    weights = torch.tensor(list(WEIGHTS.values()), dtype=torch.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)]).save(str(directory))
    return directory


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that embeds a text as the mean of its words' two numbers."""
    return save_static(tmp_path_factory.mktemp("static") / "model", word_tokenizer(list(WEIGHTS)))


BERT_WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", *"abcdefghij"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT that reads 8 tokens, two of them its own marks, and answers with the first one's state."""
    directory = tmp_path_factory.mktemp("bert")
    core = word_tokenizer(BERT_WORDS)
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    marks = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **marks).save_pretrained(directory / "bert")
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": len(BERT_WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "initializer_range": 0.5,
    }
    BertModel(BertConfig(**shape)).save_pretrained(directory / "bert")
    body = Transformer(str(directory / "bert"), max_seq_length=8)
    SentenceTransformer(modules=[body, Pooling(16, pooling_mode="cls")]).save(str(directory / "model"))
    return directory / "model"


def embedder(path: Path, **options: Any) -> Embedder:
    return Embedder(EmbedderSpec(path=str(path), device="cpu", **options))


def generation(*texts: str) -> Generation:
    completions = tuple(Completion(text=text, ids=[1], finish_reason="stop") for text in texts)
    return Generation(key="k", ref=PolicyRef(), engine="e", completions=completions)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts that were embedded since the test began, call by call."""
    seen: list[list[str]] = []
    original = SentenceTransformer.encode

    def noted(self: SentenceTransformer, inputs: Any, *args: Any, **options: Any) -> Any:
        seen.append(list(inputs))
        return original(self, inputs, *args, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", noted)
    return seen


# Cosines


def test_cosines_by_hand(static: Path) -> None:
    found = embedder(static).similarities(
        ["east", "far"],
        [
            generation("east", "north", "west", "far", "east north", "east east west"),
            generation("east", "west", "north far"),
        ],
    )
    # far is (3, 4) of length 5; north far is the mean (1.5, 3), and (3, 4)·(1.5, 3) / (5·√11.25) = 16.5 / 16.7705
    assert found[0] == pytest.approx([1, 0, -1, 0.6, math.sqrt(0.5), 1], abs=1e-6)
    assert found[1] == pytest.approx([0.6, -0.6, 16.5 / (5 * math.sqrt(11.25))], abs=1e-6)
    assert all(type(value) is float for row in found for value in row)


def test_a_length_that_float32_squares_to_nothing_counts(static: Path) -> None:
    ((value,),) = embedder(static).similarities(["tiny"], [generation("east")])
    assert value == pytest.approx(0.6, abs=1e-6)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_has_no_cosine_is_nan(static: Path) -> None:
    model = embedder(static)
    texts = ("", " \n\t", "unknown words", "east west west", "huge", "none", "east none", "east")
    (row,) = model.similarities(["east"], [generation(*texts)])
    assert [math.isnan(value) for value in row] == [True] * 7 + [False]
    for target in ("", "  ", "unknown", "huge", "none"):
        (row,) = model.similarities([target], [generation("east", target)])
        assert all(map(math.isnan, row))


def test_shapes(static: Path, encoded: list[list[str]]) -> None:
    model = embedder(static)
    assert model.similarities([], []) == []
    assert model.similarities(["east"], [generation()]) == [[]]
    assert all(map(math.isnan, model.similarities([""], [generation("", " ")])[0]))
    assert encoded == [["east"]]
    with pytest.raises(ValueError, match="zip"):
        model.similarities(["east"], [generation("east"), generation("east")])
    assert model.ready() == os.getpid()


def test_equal_texts_are_embedded_once(static: Path, encoded: list[list[str]]) -> None:
    model = embedder(static)
    found = model.similarities(
        ["east", "north", "east"], [generation("far", "east", "far"), generation("far", ""), generation("north")]
    )
    assert encoded == [["east", "north", "far"]]
    assert model.counts() == {"embedded": 3, "truncated": 0}
    assert found[0][0] == found[0][2] and found[0] == pytest.approx([0.6, 1, 0.6], abs=1e-6)
    assert found[1][0] == pytest.approx(0.8, abs=1e-6) and found[2] == pytest.approx([0], abs=1e-6)


# What a model reads of a text


def test_what_is_too_long_is_cut_and_counted(bert: Path) -> None:
    model = embedder(bert)
    six, seven = "a b c d e f", "a b c d e f g"
    found = model.similarities([six], [generation(six, seven, "a b c d e f h i j", "b a c d e f", seven)])
    assert model.counts() == {"embedded": 4, "truncated": 2}
    assert found[0][:3] == pytest.approx([1, 1, 1], abs=1e-6), "it sees the first six words of each"
    assert found[0][4] == found[0][1] and found[0][3] < 0.999
    model.similarities([seven], [generation(six)])
    assert model.counts() == {"embedded": 6, "truncated": 3}


def test_a_limit_in_a_static_models_tokenizer_counts_too(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(list(WEIGHTS))
    tokenizer.enable_truncation(2)
    model = embedder(save_static(tmp_path / "model", tokenizer))
    (row,) = model.similarities(["east"], [generation("east east", "east east north", "north")])
    assert row == pytest.approx([1, 1, 0], abs=1e-6)
    assert model.counts() == {"embedded": 4, "truncated": 1}


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_pooling_is_the_models_own_and_batches_change_nothing(bert: Path, batch_size: int) -> None:
    texts = ["a b c", "d", "e f g h i", "j a"]
    body = BertModel.from_pretrained(bert).eval()
    states = []
    for text in texts:
        ids = torch.tensor([[2, *(BERT_WORDS.index(word) for word in text.split()), 3]])
        with torch.no_grad():
            states.append(body(ids).last_hidden_state[0, 0].double())
    expected = [float(torch.cosine_similarity(states[0], state, dim=0)) for state in states]
    (row,) = embedder(bert, batch_size=batch_size).similarities([texts[0]], [generation(*texts)])
    assert row == pytest.approx(expected, abs=1e-5)
    assert max(row[1:]) < 0.99


def test_no_prompt_is_put_before_a_response(static: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(static, tmp_path / "model"))
    file = directory / "config_sentence_transformers.json"
    config = {**json.loads(file.read_text("utf-8")), "prompts": {"q": "north "}, "default_prompt_name": "q"}
    file.write_text(json.dumps(config), "utf-8")
    with_prompt = SentenceTransformer(str(directory), device="cpu").encode(["east"])
    assert with_prompt[0].tolist() == [1.0, 1.0]
    ((value,),) = embedder(directory).similarities(["east"], [generation("far")])
    assert value == pytest.approx(0.6, abs=1e-6)


def test_half_precision_weights_are_computed_with_in_full(bert: Path, tmp_path: Path) -> None:
    SentenceTransformer(str(bert), device="cpu").half().save(str(tmp_path / "half"))
    model = embedder(tmp_path / "half")
    assert {parameter.dtype for parameter in model._model.parameters()} == {torch.float32}


# Loading


def test_it_runs_no_foreign_code_and_asks_no_hub(static: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    original = SentenceTransformer.__init__

    def noted(self: SentenceTransformer, *args: Any, **options: Any) -> None:
        seen.append(options)
        original(self, *args, **options)

    monkeypatch.setattr(SentenceTransformer, "__init__", noted)
    embedder(static)
    assert len(seen) == 1
    assert seen[0]["trust_remote_code"] is False and seen[0]["local_files_only"] is True


def _no_directory(directory: Path) -> None:
    shutil.rmtree(directory)


def _no_modules(directory: Path) -> None:
    (directory / "modules.json").unlink()


def _broken_modules(directory: Path) -> None:
    (directory / "modules.json").write_text("[{")


def _foreign_code(directory: Path) -> None:
    file = directory / "modules.json"
    parts = json.loads(file.read_text("utf-8"))
    (directory / "own.py").write_text("raise SystemExit('foreign code ran')\n")
    file.write_text(json.dumps([{**parts[0], "type": "own.Model"}, *parts[1:]]), "utf-8")


def _no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def _pickled_weights(directory: Path) -> None:
    torch.save(BertModel.from_pretrained(directory).state_dict(), directory / "pytorch_model.bin")
    _no_weights(directory)


def _broken_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"no tensors")


def _broken_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    "damage",
    [
        _no_directory,
        _no_modules,
        _broken_modules,
        _foreign_code,
        _no_weights,
        _pickled_weights,
        _broken_weights,
        _broken_tokenizer,
    ],
)
def test_what_cannot_be_loaded_is_named_in_one_line(bert: Path, tmp_path: Path, damage: Any) -> None:
    directory = Path(shutil.copytree(bert, tmp_path / "model"))
    assert embedder(directory).counts() == {"embedded": 0, "truncated": 0}
    damage(directory)
    with pytest.raises(ModelError) as caught:
        embedder(directory)
    text = str(caught.value)
    assert text.startswith(f"embedder.path: {directory}") and "\n" not in text
