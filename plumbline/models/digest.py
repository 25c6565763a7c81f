"""Digests of weights: a learner says what a version's tensors are, every engine says what it holds, bit by bit.

They are computed where the tensors are, so that a model of billions is read once on its GPU and moved nowhere. A digest
is of values: the same in bfloat16 and in float32 where those are the same numbers, and the same for a tensor that lies
in a larger one filled up with zeros, as adapters of a small rank do in an engine's slots. It finds whatever goes wrong
by accident; it is no signature.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

FORMS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What engines compute in (`model.dtype`)."""
CHUNK = 2**22
"""Numbers that are hashed at once, eight bytes each."""
_ODD = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def digest(tensor: Tensor) -> str:
    """16 hexadecimal digits of a tensor of one or two dimensions; "0" * 16 where all of it is zero."""
    table = tensor.detach().reshape(tensor.shape[0], -1) if tensor.dim() else tensor.detach().reshape(1, 1)
    rows, columns = table.shape
    total = torch.zeros((), dtype=torch.int64, device=table.device)
    step = max(1, CHUNK // max(1, columns))
    for start in range(0, rows, step):
        piece = table[start : start + step].float()
        bits = piece.contiguous().view(torch.int32).long()
        total += (bits * _places(start, piece.shape[0], columns, table.device)).sum()
    return f"{int(total) % 2**64:016x}"


def _places(start: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """An odd 64-bit number for each place [rows, columns], as random as a mix of its row and column gets it."""
    row = torch.arange(start, start + rows, dtype=torch.int64, device=device)[:, None]
    column = torch.arange(columns, dtype=torch.int64, device=device)[None]
    mixed = row * _ODD[0] + (column + 1) * _ODD[1]  # integers wrap around
    mixed ^= mixed >> 29
    mixed *= _ODD[2]
    mixed ^= mixed >> 32
    return mixed | 1


def pair_digest(a: Tensor, b: Tensor) -> str:
    """Of an adapter's two matrices for one module: A, and B with its scaling multiplied in."""
    return f"{digest(a)}{digest(b)}"


def adapter_digests(
    modules: Mapping[str, tuple[Tensor, Tensor, float]], dtype: torch.dtype
) -> dict[str, dict[str, str]]:
    """Digests of an adapter's modules, A and B with the scaling of each, as engines of every dtype hold them.

    Args:
        modules: ``name -> (A [r, in], B [out, r], scaling)``, in the dtype that they are published in.
        dtype: of the published tensors.
    """
    return {
        kind: {
            name: pair_digest(a.to(dtype).to(form), b.to(dtype).to(form) * scaling)
            for name, (a, b, scaling) in modules.items()
        }
        for kind, form in FORMS.items()
    }


def lora_scalings(model: nn.Module, adapter: str) -> dict[str, float]:
    """The modules that an adapter of a PEFT model changes, named as in the model that it wraps, and their scalings."""
    wrapped = "base_model.model."
    layers: Any = model.named_modules()
    changed = ((name, layer) for name, layer in layers if adapter in getattr(layer, "lora_A", ()))
    return {name.removeprefix(wrapped): float(layer.scaling[adapter]) for name, layer in changed}


def weight_digests(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, dict[str, str]]:
    """Digests of whole weights, published in `dtype`, as engines of every dtype hold them."""
    published = {name: digest(weight.to(dtype)) for name, weight in weights.items()}
    if dtype != torch.float32:
        return {"float32": published, str(dtype).removeprefix("torch."): published}
    rounded = {name: digest(weight.to(torch.bfloat16)) for name, weight in weights.items()}
    return {"float32": published, "bfloat16": rounded}
