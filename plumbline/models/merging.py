"""A PEFT LoRA adapter that a run starts from (`model.adapter`): held against its base by the headers of both, then
merged into it. `plumbline.runs.models` asks the first, `plumbline.runs.base` the second.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from plumbline.errors import ModelError, in_one_line
from plumbline.models.adapters import hollow_model, linear_layers
from plumbline.models.files import Stored, adapter_files
from plumbline.models.loading import NAMED, first_not_finite, load_whole, quiet

KEY = "model.adapter"
_WRAPPED = "base_model.model."
"""What PEFT writes before the name of a module."""


def check_adapter(adapter: str, base: str) -> str:
    """Whether a base has all that an adapter changes, and the adapter all that it says it has; what was seen.

    Raises:
        ModelError: one of them is none, or they do not belong together.
    """
    stored, settings = adapter_files(adapter, KEY), _settings(adapter)
    hollow = hollow_model(base)
    if getattr(hollow.config, "quantization_config", None) is not None:
        raise ModelError(f"{KEY}: {adapter}: {base} is quantised, and rounds what is merged into it; give its original")
    expected = _expected(base, adapter, settings)
    shapes = {name: one.shape for name, one in stored.items()}
    for what, names in (
        ("has what the model has no place for:", stored.keys() - expected.keys()),
        ("lacks", expected.keys() - stored.keys()),
        ("has another shape than in the model:", {n for n in expected.keys() & shapes if expected[n] != shapes[n]}),
    ):
        if names:
            wrong = sorted(names)
            more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
            raise ModelError(
                f"{KEY}: {adapter}: made on another model than {base}: it {what} "
                f"{', '.join(one.removeprefix(_WRAPPED) for one in wrong[:NAMED])}{more}; give the base that it names "
                f"({settings.base_model_name_or_path or 'it names none'})"
            )
    _refuse_tied(hollow, adapter, stored)
    return f"with a LoRA adapter of rank {settings.r} in {adapter}"


def merge_adapter(adapter: str, base: str, target: Path) -> None:
    """Write a base with its adapter merged, without a tokenizer, into a directory that is there.

    The sums are in float32, on the CPU, which holds the base once; each weight is written in the dtype that it had.

    Raises:
        ModelError: they do not belong together, or the result has numbers that are not finite.
    """
    from peft import PeftModel

    check_adapter(adapter, base)
    model = load_whole(AutoModelForCausalLM, base, "auto")
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.data = weight.data.float()
    try:
        with _silent():
            merged: Any = PeftModel.from_pretrained(model, adapter).merge_and_unload()  # type: ignore[operator]
    except Exception as error:  # of PEFT, of safetensors: what the headers did not tell
        raise ModelError(f"{KEY}: {adapter}: cannot be merged into {base} ({in_one_line(error)})") from None
    for name, weight in merged.named_parameters():
        weight.data = weight.data.to(dtypes[name])
    if name := first_not_finite(merged.named_parameters()):
        raise ModelError(f"{KEY}: {adapter}: merged into {base}, {name} has values that are no finite numbers")
    with quiet():
        merged.save_pretrained(target, safe_serialization=True)


def _settings(adapter: str) -> Any:
    """What adapter_config.json says, as PEFT's LoraConfig. Raises ModelError."""
    from peft import PeftConfig, PeftType

    try:
        with _silent():
            settings: Any = PeftConfig.from_pretrained(adapter)
    except Exception as error:  # whatever a JSON object can make of a dataclass
        raise ModelError(f"{KEY}: {adapter}: adapter_config.json cannot be read ({in_one_line(error)})") from None
    kind, task = settings.peft_type, settings.task_type
    if kind != PeftType.LORA:
        raise ModelError(
            f"{KEY}: {adapter}: an adapter of type {getattr(kind, 'value', kind)}; a run starts from LoRA: merge this "
            "one into its base, and give what you save then as `model.path`"
        )
    if task not in (None, "CAUSAL_LM"):
        raise ModelError(f"{KEY}: {adapter}: an adapter for {getattr(task, 'value', task)}; a run's is for CAUSAL_LM")
    return settings


def _expected(base: str, adapter: str, settings: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what an adapter with such settings has on a base. Raises ModelError."""
    from peft import get_peft_model, get_peft_model_state_dict

    named, settings.base_model_name_or_path = settings.base_model_name_or_path, None
    initialised, settings.init_lora_weights = settings.init_lora_weights, False  # some take the base's weights apart
    try:
        with _silent(), torch.device("meta"):
            model: Any = get_peft_model(hollow_model(base), settings)
            settings.base_model_name_or_path = None  # PEFT would look there, or on the hub, for its vocabulary
            found = get_peft_model_state_dict(model)
    except Exception as error:  # PEFT's own words say which modules are not there
        layers = ", ".join(linear_layers(hollow_model(base)))
        raise ModelError(
            f"{KEY}: {adapter}: does not fit {base}, whose linear layers are {layers} ({in_one_line(error)})"
        ) from None
    finally:
        settings.base_model_name_or_path, settings.init_lora_weights = named, initialised
    return {name: tuple(weight.shape) for name, weight in found.items()}


def _refuse_tied(hollow: Any, adapter: str, stored: dict[str, Stored]) -> None:
    """Merged into one of two tied embeddings, an adapter would change the other."""
    if not hollow.config.tie_word_embeddings:
        return
    ends = (hollow.get_input_embeddings(), hollow.get_output_embeddings())
    for name in (name for name, module in hollow.named_modules() if module in ends):
        if any(one.startswith(f"{_WRAPPED}{name}.") for one in stored):
            raise ModelError(
                f"{KEY}: {adapter}: changes {name}, which is one tensor with the other embedding in this model; merge "
                "it into a copy with `tie_word_embeddings: false`, and give that as `model.path`"
            )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What PEFT warns of was looked at here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
