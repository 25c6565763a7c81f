"""Attention for one packed row in which the responses of a group share their prompt. Used by `group_logps`.

The row is [prompt, response, response, …, prompt, response, …] with no padding; a response sees its own prompt and
itself, nothing else. The dense parts of a model run over the row as it is; this file replaces its attention, through
transformers' registry, by one SDPA call per response, so that no mask over the whole row ever exists.

A model keeps the implementation once it is installed: gradient checkpointing looks it up again in the backward pass,
long after the forward. A call that brings no layout (generate, a plain forward) goes to transformers' own attention.
"""

import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from plumbline.errors import ModelError

SDPA = "plumbline_shared_prefix"
EAGER = "plumbline_shared_prefix_eager"  # the same, for models whose plain attention is not what SDPA computes


class Layout:
    """Where the groups of a packed row lie, and what attention did with it. A keyword argument of every layer.

    A plain class, not a dataclass: wrappers that move tensors between devices rebuild dataclasses and leave this alone.

    Attributes:
        segments: lengths that cut the row, a group's prompt with its first response being one segment. Sums to T.
        groups: for each group its prompt's length and how many segments it has.
        calls: how many attention layers have used the layout.
        windows, mask_windows: sliding windows that layers applied, and that the model asked of its masks.
    """

    __slots__ = ("_masks", "calls", "groups", "mask_windows", "segments", "windows")

    def __init__(self, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        """`groups`: each prompt's length with the lengths of its responses, in the order of the row."""
        self.segments: list[int] = []
        self.groups: list[tuple[int, int]] = []
        for prompt, responses in groups:
            first, *rest = [length for length in responses if length] or [0]
            self.segments += [prompt + first, *rest]
            self.groups.append((prompt, 1 + len(rest)))
        self.calls = 0
        self.windows: set[int | None] = set()
        self.mask_windows: set[int | None] = set()
        self._masks: dict[tuple[int, int, int | None, torch.device], Tensor] = {}

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """True where a query may look, [queries, keys]: the last query at the last key. Made once for all layers."""
        key = (queries, keys, window, device)
        if key not in self._masks:
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            self._masks[key] = (distance >= 0) & (distance < (window or keys))
        return self._masks[key]


_MASKED_BY: ContextVar[Layout | None] = ContextVar("layout of the forward whose masks are being made", default=None)


def install(config: PreTrainedConfig) -> str | None:
    """Make models of `config` use this attention wherever a layout is passed; return what they used before.

    Where the model caps its attention scores, plain calls go to its eager attention from now on: transformers' SDPA
    leaves the cap out without a word.
    """
    before = config._attn_implementation
    if before not in (SDPA, EAGER):
        eager = before == "eager" or getattr(config, "attn_logit_softcapping", None) is not None
        config._attn_implementation = EAGER if eager else SDPA
    return before


def run(body: nn.Module, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Hidden states [T, d] of a packed row: `ids` and `positions` [T], through a model without its LM head."""
    token = _MASKED_BY.set(layout)
    try:
        out = body(input_ids=ids[None], position_ids=positions[None], use_cache=False, plumbline_layout=layout)
    finally:
        _MASKED_BY.reset(token)
    return out[0][0]


def _shared_prefix(plain: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function to register, with `plain` for calls without a layout."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        plumbline_layout: Layout | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if plumbline_layout is None:
            return plain(module, query, key, value, attention_mask, **options)
        return _attend_row(query, key, value, plumbline_layout, **options), None

    return attention


def _attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> Tensor:
    """[1, H, T, d] queries, [1, H or fewer, T, d] keys and values -> [1, T, H, d]."""
    if dropout:
        raise ModelError("attention dropout is on; call plumbline.models.group_logps.disable_dropout(model) first")
    for name in ("s_aux", "position_bias"):
        if others.get(name) is not None:
            raise NotImplementedError(f"its attention takes {name}")
    layout.calls += 1
    layout.windows.add(sliding_window)

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return _attend(queries, keys, values, layout, scaling, sliding_window, softcap).transpose(1, 2)

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # Cut once: a slice per response would have a backward pass that writes the whole row for each of them.
    parts = zip(*(tensor.split(layout.segments, dim=2) for tensor in (query, key, value)), strict=True)
    out: list[Tensor] = []
    for prompt, count in layout.groups:
        queries, keys, values = next(parts)
        out.append(attend(queries, keys, values))
        prompt_keys, prompt_values = keys[:, :, :prompt], values[:, :, :prompt]
        for _ in range(count - 1):
            queries, keys, values = next(parts)
            keys, values = torch.cat([prompt_keys, keys], dim=2), torch.cat([prompt_values, values], dim=2)
            out.append(attend(queries, keys, values))
    return torch.cat(out, dim=1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of a sequence's last queries to all its keys: [1, H, n, d] and [1, H, N, d] -> [1, H, n, d]."""
    queries, keys = query.shape[2], key.shape[2]
    if window is not None and window >= keys:
        window = None
    if softcap is None and window is None and queries == keys:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True)
    mask = layout.mask(queries, keys, window, query.device)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    return scores.float().masked_fill(~mask, -torch.inf).softmax(dim=-1).to(value.dtype) @ value


def _plain_eager(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """A model's own eager attention, which transformers keeps out of its registry, in the file of the model."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **options)


def _mask(plain: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """The mask function to register: nothing for a packed row, `plain` for every other forward."""

    def make(*args: Any, **options: Any) -> Tensor | None:
        layout = _MASKED_BY.get()
        if layout is None:
            return plain(*args, **options)
        layout.mask_windows.add(options.get("local_size"))
        return None

    return make


AttentionInterface.register(SDPA, _shared_prefix(sdpa_attention_forward))
AttentionInterface.register(EAGER, _shared_prefix(_plain_eager))
AttentionMaskInterface.register(SDPA, _mask(sdpa_mask))
AttentionMaskInterface.register(EAGER, _mask(eager_mask))
