"""Models as their files have them, whole: what transformers only reports, random weights in place of missing ones, ends
the run here. Every process that loads a model by transformers calls it.
"""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from plumbline.errors import ModelError, in_one_line

NAMED = 3
"""Weights that a message names; of more it says how many."""


def load_whole(factory: Any, path: str, dtype: str, *, new_head: bool = False, **settings: Any) -> Any:
    """``factory.from_pretrained`` from safetensors, without remote code, on the CPU.

    Args:
        factory: one of transformers' AutoModel classes.
        dtype: `float32` and the like, or `auto`: what the files have.
        new_head: the head may be another than the files', and random: a classifier to be trained from a causal LM.
        settings: of the model's config, such as `num_labels`.

    Raises:
        ModelError: the files cannot be read, lack a weight, have one that the model has not or of another shape, or
            one that is not finite.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report, a table of warnings, becomes one line below
    try:
        model, report = factory.from_pretrained(
            path,
            dtype=getattr(torch, dtype, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be named below
            **settings,
        )
    except Exception as error:  # of safetensors, of transformers, of the disk: all mean that the files are no model
        raise ModelError(f"model {path}: cannot be loaded ({in_one_line(error)})") from None
    finally:
        logging.set_verbosity(verbosity)
    body = f"{model.base_model_prefix}."
    shapes = [name for name, *_ in report["mismatched_keys"]]
    for what, names in (
        ("lacks", report["missing_keys"]),
        ("has what its config.json knows nothing of:", report["unexpected_keys"]),
        ("has another shape than its config.json says:", shapes),
    ):
        if wrong := sorted(name for name in names if not new_head or name.startswith(body)):
            more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
            raise ModelError(f"model {path}: it {what} {', '.join(wrong[:NAMED])}{more}; save it whole again")
    if name := first_not_finite(model):
        raise ModelError(f"model {path}: {name} has values that are no finite numbers; it was damaged, or diverged")
    return model


def first_not_finite(model: nn.Module) -> str | None:
    """The name of a weight with NaN or infinite values."""
    return next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)


def nf4_settings(dtype: str, device: str) -> dict[str, Any]:
    """Settings for `load_whole` of a model whose linear layers, but the LM head, are in 4 bits; it is on `device` then.

    NormalFloat4 with doubly quantised scales, as vLLM's `quantization: bitsandbytes` has it.
    """
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": quantization, "device_map": {"": device}}
