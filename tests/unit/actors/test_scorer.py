"""Scores: of a Python function, and of a sequence classifier against its own plain forward."""

import importlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from actors.scorer import Query, Scorer, ScorerSpec, _batches, load_function
from plumbline.data.reward_text import reward_texts
from plumbline.data.tokenizer import read_tokenizer
from plumbline.errors import ConfigError
from plumbline.miniature.tokenizer import make_tokenizer
from plumbline.records import Completion, Generation, Message, PolicyRef, ScoreRequest

QUESTION = (Message(role="user", content="Why?"),)
TEXTS = ["Rain", "Rain is water, and the sky is blue.", "No", "I am sorry, but no: that is not a thing to help with."]


def asked(*responses: str, **extra: object) -> list[ScoreRequest]:
    return [ScoreRequest(messages=QUESTION, response=response, extra=extra) for response in responses]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module of the working directory, its body given by the test; `CALLS` is for it to note its calls in."""
    name = f"reward_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text("CALLS = []\n" + request.param, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


LENGTHS = "def score(requests):\n    CALLS.append(len(requests))\n    return [len(r.response) for r in requests]\n"


# Functions


@pytest.mark.parametrize("module", [LENGTHS], ids=["body"], indirect=True)
def test_a_function_of_the_working_directory_scores(module: str) -> None:
    scores, _ = Scorer(ScorerSpec(function=f"{module}:score")).score(asked("abc", "a"))
    assert scores == [3.0, 1.0]
    assert all(type(score) is float for score in scores)


@pytest.mark.parametrize("module", [LENGTHS], ids=["body"], indirect=True)
def test_a_blank_answer_is_nan_and_not_asked_about(module: str) -> None:
    scorer = Scorer(ScorerSpec(function=f"{module}:score"))
    scores, _ = scorer.score(asked("abc", "", " \n\t", "a"))
    assert [scores[0], scores[3]] == [3.0, 1.0]
    assert math.isnan(scores[1]) and math.isnan(scores[2])
    assert all(map(math.isnan, scorer.score(asked("", " "))[0]))
    assert importlib.import_module(module).CALLS == [2], "the function saw the two that have text, and nothing else"


@pytest.mark.parametrize(
    "module", ["def score(requests):\n    return [float('nan'), float('inf')]\n"], ids=["body"], indirect=True
)
def test_a_score_that_is_no_finite_number_is_passed_on(module: str) -> None:
    (nan, infinite), failure = Scorer(ScorerSpec(function=f"{module}:score")).score(asked("a", "b"))
    assert failure == ""
    assert math.isnan(nan) and infinite == math.inf


@pytest.mark.parametrize(
    "module", ["def score(requests):\n    return [1.0] * (len(requests) - 1)\n"], ids=["body"], indirect=True
)
def test_another_number_of_scores_is_refused(module: str) -> None:
    scores, failure = Scorer(ScorerSpec(function=f"{module}:score")).score(asked("a", "b"))
    assert all(map(math.isnan, scores)) and "returned 1 scores for 2 requests; it must be one each" in failure


FAILS = """
def score(requests):
    CALLS.append(len(requests))
    if len(CALLS) <= {times}:
        raise KeyError("weight")
    return [1.0] * len(requests)
"""


@pytest.mark.parametrize(
    ("module", "failure"),
    [(FAILS.format(times=1), ""), (FAILS.format(times=2), "KeyError: 'weight'")],
    indirect=["module"],
)
def test_a_reward_that_fails_is_asked_once_more(module: str, failure: str) -> None:
    scorer = Scorer(ScorerSpec(function=f"{module}:score"))
    query = Query(messages=QUESTION, extra={})
    scores = scorer.score_answers([query, query], [["a", " "], ["b"]])
    assert scores.failure == failure
    assert [len(one) for one in scores.values] == [2, 1]
    assert all(map(math.isnan, scores.values[0])) if failure else scores.values[0][0] == 1.0
    assert importlib.import_module(module).CALLS == [2, 2], "the blank one is not asked about"
    assert scorer.score_answers([query], [["c"]]).values == [[1.0]], "it goes on"


@pytest.mark.parametrize(
    "module", ["def score(requests):\n    return [None for _ in requests]\n"], ids=["body"], indirect=True
)
def test_what_is_no_score_is_a_failure(module: str) -> None:
    scores = Scorer(ScorerSpec(function=f"{module}:score")).score_answers([Query(messages=QUESTION, extra={})], [["a"]])
    assert scores.failure.startswith("TypeError: float() argument must be")


@pytest.mark.parametrize(
    "module",
    ["def score(requests):\n    return [r.extra['weight'] * len(r.messages) for r in requests]\n"],
    ids=["body"],
    indirect=True,
)
def test_a_generation_is_scored_with_its_query_one_list_a_generation(module: str) -> None:
    def generation(*texts: str) -> Generation:
        completions = tuple(Completion(text=text, ids=[1], finish_reason="stop") for text in texts)
        return Generation(key="k", ref=PolicyRef(), engine="e", completions=completions)

    queries = [Query(messages=QUESTION, extra={"weight": 2}), Query(messages=QUESTION * 2, extra={"weight": 10})]
    scores = Scorer(ScorerSpec(function=f"{module}:score")).score_generations(
        queries, [generation("a", "b"), generation("c")]
    )
    assert (scores.values, scores.failure) == ([[2.0, 2.0], [20.0]], "")


@pytest.mark.parametrize("module", ["score = 3\n"], ids=["body"], indirect=True)
def test_functions_that_are_none(module: str) -> None:
    for name, part in (
        ("no_such_module_here:score", "No module named 'no_such_module_here'"),
        (f"{module}:scores", "has no attribute 'scores'"),
        (f"{module}:score", "is no function"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_function(name)
        assert str(caught.value).startswith(f"reward.function: {name}")
        assert part in str(caught.value)


# Batches


def test_batches_hold_as_much_as_the_budget_lets_them() -> None:
    lengths = [5, 1, 3, 3, 9, 2]
    order = sorted(range(6), key=lambda i: lengths[i])
    assert _batches(order, lengths, 10, pads=True) == [[1, 5, 2], [3, 0], [4]]
    assert _batches(order, lengths, 10, pads=False) == [[1, 5, 2, 3], [0], [4]]
    for pads in (True, False):
        assert _batches(order, lengths, 1000, pads=pads) == [order]
        assert _batches(order, lengths, 1, pads=pads) == [[i] for i in order], "what exceeds the budget goes alone"
        assert _batches([], [], 10, pads=pads) == []


# Classifiers


def make_classifier(directory: Path, kind: str, labels: int) -> Path:
    """Random weights; the tokenizer pads on the left, as those of chat models do."""
    tokenizer = make_tokenizer()
    assert tokenizer.padding_side == "left"
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "num_labels": labels,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.5,
    }
    torch.manual_seed(1)
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(**shape))
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**{**shape, "pad_token_id": None}))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["bert", "llama"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def direct(path: Path, texts: Sequence[str]) -> list[list[float]]:
    """Logits of each text by itself, unpadded."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer: Any = read_tokenizer(str(path))
    with torch.no_grad():
        return [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0].tolist() for text in texts]


@pytest.mark.parametrize("budget", [1, 24, 8192])
def test_a_classifiers_value_is_that_of_the_plain_forward(tmp_path: Path, kind: str, budget: int) -> None:
    path = make_classifier(tmp_path / "m", kind, labels=1)
    scores, _ = Scorer(ScorerSpec(path=str(path), batch_tokens=budget)).score(asked(*TEXTS))
    expected = [logits[0] for logits in direct(path, TEXTS)]
    assert max(expected) - min(expected) > 0.1
    assert scores == pytest.approx(expected, abs=1e-4)


def test_of_two_labels_the_score_is_the_second_ones_log_odds(tmp_path: Path, kind: str) -> None:
    path = make_classifier(tmp_path / "m", kind, labels=2)
    scores, _ = Scorer(ScorerSpec(path=str(path))).score(asked(*TEXTS))
    expected = [second - first for first, second in direct(path, TEXTS)]
    assert scores == pytest.approx(expected, abs=1e-4)


def test_three_labels_are_no_reward(tmp_path: Path) -> None:
    path = make_classifier(tmp_path / "m", "bert", labels=3)
    with pytest.raises(ConfigError, match="a classifier of 3 labels; a reward has 1 or 2"):
        Scorer(ScorerSpec(path=str(path)))


def test_what_is_too_long_is_cut_and_counted(tmp_path: Path) -> None:
    path = make_classifier(tmp_path / "m", "bert", labels=1)
    scorer = Scorer(ScorerSpec(path=str(path), max_len=3))
    (long, short), _ = scorer.score(asked("Rain is water, and the sky is blue.", "Rain is"))
    assert scorer._reward.truncated == 1  # type: ignore[attr-defined]
    assert long == pytest.approx(direct(path, ["Rain is water"])[0][0], abs=1e-4)
    assert short == pytest.approx(direct(path, ["Rain is"])[0][0], abs=1e-4)


def test_what_a_classifier_reads(tiny_model: Path) -> None:
    tokenizer: Any = read_tokenizer(str(tiny_model))

    def read(reads: Any, max_len: int = 64) -> tuple[str, bool]:
        [text] = reward_texts(tokenizer, asked("I am sorry"), reads=reads, max_len=max_len)
        return tokenizer.decode(text.ids), text.cut

    assert read("response") == ("I am sorry", False)
    assert read("response", 2) == ("I am", True)
    assert read("conversation")[0].endswith("<|im_start|>assistant\nI am sorry<|im_end|>\n")
    assert read("conversation", 3) == (" sorry<|im_end|>\n", True), "the answer's end stays"
    assert read("pair")[0].endswith("I am sorry")
    assert len(read("pair")[0]) > len("I am sorry")


@pytest.mark.parametrize("budget", [1, 8192])
def test_of_a_pair_a_classifier_is_told_which_segment_is_the_answer(tmp_path: Path, budget: int) -> None:
    path = make_classifier(tmp_path / "m", "bert", labels=1)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "why", "?", "rain", "no", "is", "the", "sky", "blue"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(path)
    model = BertForSequenceClassification.from_pretrained(path).eval()
    answers = ["Rain is the sky", "no", "the blue sky is the blue rain"]
    with torch.no_grad():
        rows = [tokenizer("Why?", answer, return_tensors="pt") for answer in answers]
        expected = [model(**row).logits.item() for row in rows]
        blind = [model(input_ids=row["input_ids"]).logits.item() for row in rows]
    assert min(abs(one - other) for one, other in zip(expected, blind, strict=True)) > 1e-2
    scores, _ = Scorer(ScorerSpec(path=str(path), reads="pair", batch_tokens=budget)).score(asked(*answers))
    assert scores == pytest.approx(expected, abs=1e-4)
    text, short = reward_texts(tokenizer, asked(*answers[:2]), reads="pair", max_len=6)
    assert short.beside == {"token_type_ids": [0, 0, 0, 0, 1, 1]} and not short.cut
    assert text.cut and text.beside == {"token_type_ids": [0, 0, 0, 0, 1, 1]}, "cut as the ids are"
