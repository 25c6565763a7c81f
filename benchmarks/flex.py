"""The other candidate for the learner's attention on GPUs, FlexAttention, for `group_logps.py` to measure.

No keys are laid anew: the row attends to itself under a mask of blocks, made once a row, and the kernel is compiled for
rows of any length. What it would be chosen for is a model that caps its scores, which `varlen_attn` cannot.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from plumbline.models import shared_prefix
from plumbline.models.shared_prefix import Layout


@contextmanager
def in_place_of_varlen(*, compiled: bool = True) -> Iterator[None]:
    """Packed rows go through FlexAttention meanwhile."""
    before = shared_prefix._attend_packed
    shared_prefix._attend_packed = attention(compiled)
    try:
        yield
    finally:
        shared_prefix._attend_packed = before


@cache
def attention(compiled: bool) -> Callable[..., Tensor]:
    """A function as `shared_prefix._attend_packed`; the mask of a layout is kept for all layers."""
    kernel: Any = torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
    kept: list[tuple[Layout, BlockMask]] = []

    def attend(
        query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, window: int | None
    ) -> Tensor:
        assert window is None, "the models of this benchmark have none"
        if not kept or kept[0][0] is not layout:
            kept[:] = [(layout, block_mask(layout, query.device, compiled))]
        gqa = key.shape[1] != query.shape[1]
        out = kernel(query, key, value, block_mask=kept[0][1], scale=scaling, enable_gqa=gqa)
        return out.transpose(1, 2)

    return attend


def block_mask(layout: Layout, device: torch.device, compiled: bool) -> BlockMask:
    """Each token sees what stands before it in its own segment, and in the prompt of its group."""
    segment, group, prompt = [], [], []
    segments = iter(enumerate(layout.segments))
    for number, (length, count) in enumerate(layout.groups):
        for nth, (name, size) in zip(range(count), segments, strict=False):
            segment += [name] * size
            group += [number] * size
            prompt += [nth == 0 and i < length for i in range(size)]
    segment_of, group_of, in_prompt = (torch.tensor(one, device=device) for one in (segment, group, prompt))

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = (segment_of[q] == segment_of[k]) | (in_prompt[k] & (group_of[q] == group_of[k]))
        return near & (q >= k)

    size = len(segment)
    return create_block_mask(sees, None, None, size, size, device=device, _compile=compiled)
