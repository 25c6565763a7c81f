"""What adapters may name of a model: checked by its config alone."""

from pathlib import Path
from typing import Any

import pytest

from actors.engines.seam import engine_spec
from actors.engines.vllm import adapter_settings
from plumbline.config.tree import Config
from plumbline.errors import ConfigError
from plumbline.models.adapters import check_policies, linear_names
from plumbline.placement.plan import without_gpus

LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def config(model: Path, *policies: dict[str, Any], sft: dict[str, Any] | None = None, tied: bool = False) -> Config:
    origin: dict[str, Any] = {"path": str(model), "max_len": 64}
    if tied:
        shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        origin = {"init": {"model_type": "llama", **shape, "tie_word_embeddings": True}, "tokenizer": str(model)}
    return Config.model_validate(
        {
            "name": "a",
            "model": origin,
            "data": {"train": {"path": "d"}},
            "reward": {"type": "program", "function": "a:b"},
            "pipelines": [{"type": "raft", "name": f"p{i}", "policy": policy} for i, policy in enumerate(policies)],
            **({"sft": {"policy": sft}} if sft else {}),
        }
    )


def test_all_linear_layers_but_the_head(tiny_model: Path) -> None:
    assert linear_names(str(tiny_model)) == LINEAR


def test_layers_that_are_there(tiny_model: Path) -> None:
    sft = {"type": "lora", "modules_to_save": ["lm_head", "norm", "embed_tokens"]}
    check_policies(config(tiny_model, {"type": "lora", "target_modules": ["q_proj", "v_proj"]}, sft=sft))


@pytest.mark.parametrize(
    ("policy", "sft", "message"),
    [
        (
            {"target_modules": ["q_proj", "q_prj"]},
            None,
            f"target_modules of 'p0': the model has no layer 'q_prj'; it has {', '.join(LINEAR)}",
        ),
        ({"target_modules": ["lm_head"]}, None, "target_modules of 'p0': the model has no layer 'lm_head'; it has "),
        (
            {},
            {"modules_to_save": ["mlp"]},
            "modules_to_save of 'sft': the model has no layer 'mlp'; it has down_proj, ",
        ),
    ],
)
def test_layers_that_are_not_there(
    tiny_model: Path, policy: dict[str, Any], sft: dict[str, Any] | None, message: str
) -> None:
    asked = config(tiny_model, {"type": "lora", **policy}, sft=sft and {"type": "lora", **sft})
    with pytest.raises(ConfigError, match=message):
        check_policies(asked)


def test_a_tied_head_is_not_trained_alone(tiny_model: Path) -> None:
    asked = config(tiny_model, {"type": "lora"}, sft={"type": "lora", "modules_to_save": ["lm_head"]}, tied=True)
    with pytest.raises(ConfigError, match="'lm_head' is one tensor with the other of embed_tokens and lm_head in this"):
        check_policies(asked)


def test_what_generators_serve_has_no_whole_layers(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="`modules_to_save` of 'p0': generators take adapters without whole layers"):
        config(tiny_model, {"type": "lora", "modules_to_save": ["norm"]})


@pytest.mark.parametrize("targets", ["q_proj", [], [3]])
def test_targets_that_are_no_list_of_names(tiny_model: Path, targets: object) -> None:
    with pytest.raises(ValueError, match="should be all-linear, or a list of layers' last names"):
        config(tiny_model, {"type": "lora", "target_modules": targets})


# Four and eight bits


def learning(model: Path, *learners: dict[str, Any], policy: str = "lora") -> Config:
    """DPO pipelines with these learners."""
    pipelines = [
        {"type": "self_contrast", "filter": False, "name": f"p{i}", "policy": {"type": policy}, "learner": learner}
        for i, learner in enumerate(learners)
    ]
    return Config.model_validate(
        {
            "name": "a",
            "model": {"path": str(model), "max_len": 64},
            "data": {"train": {"path": "d"}},
            "pipelines": pipelines,
        }
    )


def test_a_reference_is_what_its_learners_start_from(tiny_model: Path) -> None:
    assert learning(tiny_model, {"quantize": "nf4"}, {"quantize": "nf4"}).reference_quantize == "nf4"
    assert learning(tiny_model, {}).reference_quantize is None
    with pytest.raises(ValueError, match=r"pipelines of unlike `learner.quantize` share one reference"):
        learning(tiny_model, {"quantize": "nf4"}, {})


@pytest.mark.parametrize(
    ("learner", "policy", "message"),
    [
        (
            {"quantize": "nf4"},
            "full",
            "`learner.quantize` is for a base under an adapter; write ",
        ),
        ({"quantize": "nf4", "strategy": "deepspeed"}, "lora", "`quantize` cannot be cut over workers by deepspeed"),
        (
            {"optimizer": "adamw_8bit", "strategy": "deepspeed", "zero": 3},
            "lora",
            "`optimizer: adamw_8bit` cannot be cut over workers by deepspeed; write `strategy: torch`",
        ),
    ],
)
def test_what_does_not_go_together(tiny_model: Path, learner: dict[str, Any], policy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learning(tiny_model, learner, policy=policy)


@pytest.mark.parametrize("learner", [{"quantize": "nf4"}, {"optimizer": "adamw_8bit"}])
def test_a_library_that_is_not_installed(
    tiny_model: Path, learner: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    [(key, value)] = learner.items()
    monkeypatch.setattr("plumbline.models.adapters.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"`{key}: {value}` of 'p0' needs bitsandbytes, which is not installed"):
        check_policies(learning(tiny_model, learner))


@pytest.mark.parametrize(
    ("policies", "expected"),
    [
        ([{"target_modules": ["q_proj", "v_proj"]}], ["q_proj", "v_proj"]),
        ([{"target_modules": ["q_proj"]}, {"target_modules": ["o_proj", "q_proj"], "r": 30}], ["o_proj", "q_proj"]),
        ([{"target_modules": ["q_proj"]}, {}], LINEAR),
    ],
)
def test_an_engine_is_ready_for_all_adapters_of_its_run(
    tiny_model: Path, policies: list[dict[str, Any]], expected: list[str]
) -> None:
    asked = config(tiny_model, *({"type": "lora", **policy} for policy in policies))
    settings = adapter_settings(engine_spec(without_gpus(asked), str(tiny_model), "float32", "cpu", versions=2))
    assert settings["lora_target_modules"] == expected
    assert settings["max_lora_rank"] == (32 if "r" in policies[-1] else 8)
