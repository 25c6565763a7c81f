"""Packed rows through models of unknown making: their hidden states, and whether those are what the plain forward has.

What `group_logps` and `classifier` have in common. Both lay their texts in one row (`shared_prefix`), and both must
find out once, of each model, whether it can be computed that way.
"""

import logging
from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.errors import ModelError
from plumbline.models import shared_prefix

log = logging.getLogger(__name__)

_SUPPORTED = "_plumbline_packed"


def hidden_states(model: PreTrainedModel, ids: list[int], positions: list[int], layout: shared_prefix.Layout) -> Tensor:
    """Last hidden states [T, d] of a packed row.

    Raises NotImplementedError: a layer has not used the layout, or not as the model's masks would have it.
    """
    config = model.config.get_text_config()
    shared_prefix.install(config)  # again: a caller may have set another implementation since
    row = torch.tensor([ids, positions], device=device_of(model))
    hidden = shared_prefix.run(model.base_model, row[0], row[1], layout)
    if layout.calls != config.num_hidden_layers:  # a layer that missed the layout mixed the texts up
        raise NotImplementedError(f"{layout.calls} of {config.num_hidden_layers} layers used the attention interface")
    if layout.windows - {None} != layout.mask_windows - {None}:
        raise NotImplementedError("its attention is local in a way that only its mask knows")
    return hidden


def supports(model: nn.Module, compare: Callable[[PreTrainedModel], str], otherwise: str) -> bool:
    """Whether `model` can be given packed rows; found once per model, and remembered.

    Where the answer is no, the reason is logged as a warning and the model is as it was.

    Args:
        compare: computes a tiny batch both ways; how they differ, "" where they agree.
        otherwise: what the warning says is done instead.
    """
    known = model.__dict__.get(_SUPPORTED)  # not getattr: PEFT's looks on into the model that it wraps
    if known is None:
        reason = _why_not(model, compare)
        if reason:
            log.warning("%s: no shared-prefix forward (%s); %s", type(model).__name__, reason, otherwise)
        known = not reason
        setattr(model, _SUPPORTED, known)
    return known


def difference(packed: Tensor, plain: Tensor, model: PreTrainedModel, scale: float | Tensor, what: str) -> str:
    """How far `packed` is from `plain`, "" where that is within what `model` rounds of numbers as large as `scale`."""
    exact = model.dtype in (torch.float32, torch.float64) and torch.get_float32_matmul_precision() == "highest"
    relative = 1e-4 if exact and not torch.is_autocast_enabled(device_of(model).type) else 2e-2
    apart = (packed - plain).abs()
    return (
        "" if (apart <= 1e-5 + relative * scale).all() else f"{what} differ from the plain forward by {apart.max():.2g}"
    )


def _why_not(model: nn.Module, compare: Callable[[PreTrainedModel], str]) -> str:
    """Why `model` cannot be given packed rows, "" if it can; see `supports`."""
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "its adapter is a learned prompt"
    if inner.base_model is inner:
        return "it has no body and head to call apart"
    rope = getattr(config, "rope_parameters", None) or {}
    if any(kind in str(rope) for kind in ("dynamic", "longrope")):
        return "its rotary frequencies depend on the length of the row"
    before = shared_prefix.install(config)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            reason = compare(inner)
    except (torch.OutOfMemoryError, ModelError):
        raise
    except Exception as error:  # whatever a model of unknown making raises means no; it is logged
        reason = f"{type(error).__name__}: {error}"
    finally:
        for module in training:
            module.training = True
    if reason:
        config._attn_implementation = before
    return reason


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model, out of PEFT's wrapper where it is in one. Raises ModelError where it is none."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is not a transformers model, nor PEFT around one")
    return inner


def device_of(model: nn.Module) -> torch.device:
    """Where its parameters are."""
    return next(model.parameters()).device
