"""What policies need, looked at without a model's weights: the doctor refuses a layer that is not there and a library
that is not installed, and vLLM is told which layers adapters touch.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plumbline.config.learner import LoraPolicy
from plumbline.config.tree import Config
from plumbline.errors import ConfigError


def check_policies(config: Config) -> None:
    """Whether the layers that adapters name are there, and what learners compute in. Raises ConfigError."""
    for one in [*config.pipelines, *([config.sft] if config.sft else [])]:
        key = "quantize: nf4" if one.learner.quantize else "optimizer: adamw_8bit"
        if (one.learner.quantize or one.learner.optimizer == "adamw_8bit") and find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"`{key}` of {one.name!r} needs bitsandbytes, which is not installed here; pip install bitsandbytes"
            )
    sections = [*config.served, *([config.sft] if config.sft else [])]
    for section in sections:
        policy = section.policy
        if isinstance(policy, LoraPolicy) and (policy.target_modules != "all-linear" or policy.modules_to_save):
            _check_layers(hollow_model(config.model.path, config.model.init), section.name, policy)


def _check_layers(model: PreTrainedModel, name: str, policy: LoraPolicy) -> None:
    linear = linear_layers(model)
    holding = _last_names(model, lambda module: next(module.parameters(recurse=False), None) is not None)
    targets = linear if policy.target_modules == "all-linear" else policy.target_modules
    for key, asked, there in (
        ("target_modules", targets, linear),
        ("modules_to_save", policy.modules_to_save, holding),
    ):
        if wrong := [one for one in asked if one not in there]:
            raise ConfigError(f"{key} of {name!r}: the model has no layer {wrong[0]!r}; it has {', '.join(there)}")
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = _last_names(model, lambda module: module in embeddings) if model.config.tie_word_embeddings else []
    if wrong := [one for one in policy.modules_to_save if one in tied]:
        raise ConfigError(
            f"modules_to_save of {name!r}: {wrong[0]!r} is one tensor with the other of {' and '.join(tied)} in this "
            "model; leave it out, or write `policy: {type: full}`"
        )


def hollow_model(path: str | None, init: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """The causal LM of a directory, or of a transformers config, without weights."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False) if path else AutoConfig.for_model(**(init or {}))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def linear_names(path: str) -> list[str]:
    """See `linear_layers`, of the model in a directory."""
    return linear_layers(hollow_model(path))


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Last names of the linear layers that an adapter on all of them touches: every one but the output embedding."""
    head = model.get_output_embeddings()
    return _last_names(model, lambda module: isinstance(module, nn.Linear | Conv1D) and module is not head)


def _last_names(model: nn.Module, which: Callable[[nn.Module], bool]) -> list[str]:
    """Each once, sorted."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if which(module)})
