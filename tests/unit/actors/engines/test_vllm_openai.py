"""What is looked at around vLLM's own protocol, without vLLM."""

import json
import math
from typing import Any

import pytest

from actors.engines.vllm_openai import NO_CHANCE, beyond, strict

IDS = 704


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a"},
        {"prompt": ["a", "704"]},
        {"prompt": [0, IDS - 1]},
        {"prompt": [[0], [IDS - 1]]},
        {"prompt": [0], "logit_bias": {"0": 1.0, str(IDS - 1): -100}},
        {"messages": [{"role": "user", "content": "704"}]},
    ],
)
def test_what_the_model_has(body: dict[str, Any]) -> None:
    assert beyond(body, IDS) is None


@pytest.mark.parametrize(
    ("body", "field", "named"),
    [
        ({"prompt": [IDS]}, "prompt", "704"),
        ({"prompt": [1, -1]}, "prompt", "-1"),
        ({"prompt": [[1], [2, 10**30]]}, "prompt", str(10**30)),
        ({"prompt": "a", "logit_bias": {str(IDS): 1}}, "logit_bias", "'704'"),
        ({"messages": [], "logit_bias": {"-1": 1}}, "logit_bias", "'-1'"),
        ({"messages": [], "logit_bias": {"a": 1}}, "logit_bias", "'a'"),
        ({"messages": [], "logit_bias": {"\u0663": 1}}, "logit_bias", "0 to 703"),
    ],
)
def test_a_token_that_the_model_has_not(body: dict[str, Any], field: str, named: str) -> None:
    wrong = beyond(body, IDS)
    assert wrong is not None and wrong[0] == field and named in wrong[1]


def test_answers_are_strict_json() -> None:
    answer = {
        "choices": [{"logprobs": {"token_logprobs": [-0.5, -math.inf], "top_logprobs": [{"a": math.nan}]}}],
        "n": 1,
    }
    read = json.loads(json.dumps(strict(answer), allow_nan=False))
    assert read["choices"][0]["logprobs"] == {
        "token_logprobs": [-0.5, NO_CHANCE],
        "top_logprobs": [{"a": NO_CHANCE}],
    }
    assert read["n"] == 1
