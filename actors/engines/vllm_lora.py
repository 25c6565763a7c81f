"""Adapters on vLLM's CPU backend, at the price of what they compute, and without harm to those who ask the base.

vLLM's own takes a copy of the adapter for every token of a batch, also where no request has one: of a model of 135M
parameters that is most of an engine's time. And a request without an adapter has the index -1, by which tensors are
indexed: it gets the adapter in the *last* slot. Its GPU kernels do neither.
Importing this in a worker's process, as a `worker_extension_cls`, puts that right before the model is loaded.
"""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from actors.engines.vllm_worker import ReadsBack

Rows = slice | torch.Tensor
"""Tokens of a batch: a run of them, or their indices."""


class OncePerAdapter(PunicaWrapperCPU):
    """An adapter's two products are computed once for all of its tokens; tokens without one are left as they are."""

    _parts: tuple[tuple[int, Rows], ...] = ()

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Which tokens have which adapter, of the batch that comes."""
        super().update_metadata(*args, **kwargs)
        self._parts = parts(self.token_lora_indices)

    def add_shrink(
        self, y: tuple[torch.Tensor, ...] | torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """The first product alone, where an adapter is cut among engines: tokens without one have none of it."""
        super().add_shrink(y, x, *args, **kwargs)
        for of_slice in y:
            of_slice[self.token_lora_indices < 0] = 0

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add ``scale · x Aᵀ Bᵀ`` to y [tokens, out], for x [tokens, in], in place; the first product in float32.

        Args:
            lora_a_stacked: of each slice of y (such as q, k and v) [slots, 1, r, in].
            lora_b_stacked: of each slice [slots, 1, its own size, r].
        """
        for slot, rows in self._parts:
            alike = isinstance(rows, slice)
            asked = (x[rows] if alike else x.index_select(0, rows)).float()
            answered = y[rows] if alike else y.index_select(0, rows)
            start = 0
            for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                small = (asked @ a[slot, 0].float().T).mul_(scale)
                answered[:, start : start + size] += small.to(y.dtype) @ b[slot, 0].to(y.dtype).T
                start += size
            if not alike:  # index_add_ takes three times as long
                y.index_copy_(0, rows, answered)


def parts(indices: torch.Tensor) -> tuple[tuple[int, Rows], ...]:
    """The slots that tokens' `indices` [tokens] name, each with its tokens; -1 names none."""
    found: list[tuple[int, Rows]] = []
    for slot in indices.unique().tolist():
        if slot < 0:
            continue
        rows = (indices == slot).nonzero().squeeze(1)
        first, last = int(rows[0]), int(rows[-1]) + 1
        found.append((slot, slice(first, last) if last - first == len(rows) else rows))
    return tuple(found)


class LeavesBase(ReadsBack):
    """Mixed into vLLM's worker, to which it adds no more: the import is what counts."""


def _wrapper(cls: type) -> str:
    return f"{OncePerAdapter.__module__}.{OncePerAdapter.__qualname__}"


type(current_platform).get_punica_wrapper = classmethod(_wrapper)  # type: ignore[assignment, method-assign]
