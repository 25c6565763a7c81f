"""What is looked at of an engine without asking it: whether a model can be cut over so many GPUs."""

import pytest

from actors.engines.check import check_heads
from plumbline.config.data import Model
from plumbline.errors import ConfigError


def model(heads: int, shared: int, kind: str = "llama") -> Model:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": shared, "hidden_size": 8 * heads}
    return Model.model_validate({"init": {"model_type": kind, **sizes}, "tokenizer": "somewhere"})


@pytest.mark.parametrize(("heads", "shared", "gpus"), [(32, 8, 2), (32, 8, 8), (32, 8, 16), (28, 4, 4), (12, 2, 6)])
def test_heads_that_can_be_cut(heads: int, shared: int, gpus: int) -> None:
    check_heads(model(heads, shared), gpus)


@pytest.mark.parametrize(
    ("heads", "shared", "gpus", "right"),
    [
        (32, 8, 3, "1, 2, 4, 8, 16, 32"),
        (28, 4, 7, "1, 2, 4, 28"),
        (28, 4, 8, "1, 2, 4, 28"),
        (12, 2, 5, "1, 2, 4, 6, 12"),
    ],
)
def test_heads_that_cannot_are_refused_with_what_would_be_right(heads: int, shared: int, gpus: int, right: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_heads(model(heads, shared), gpus)
    said = str(caught.value)
    assert said.startswith(f"fleet.generator.gpus: {gpus}, ") and f"{heads} attention heads ({shared} of" in said
    assert said.endswith(f"it should be one of {right}") and "\n" not in said


def test_a_model_whose_config_names_its_heads_otherwise() -> None:
    gpt2 = Model.model_validate({"init": {"model_type": "gpt2", "n_head": 12}, "tokenizer": "somewhere"})
    check_heads(gpt2, 4)
    with pytest.raises(ConfigError, match="12 attention heads"):
        check_heads(gpt2, 5)
