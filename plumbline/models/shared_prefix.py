"""Attention for one packed row in which the responses of a group share their prompt. Used by `group_logps`.

The row is [prompt, response, response, …, prompt, response, …] with no padding; a response sees its own prompt and
itself, nothing else. The dense parts of a model run over the row as it is; this file replaces its attention, through
transformers' registry, so that no mask over the whole row ever exists: by one kernel for all responses where the GPU
has it (`_attend_packed`), else by one SDPA call per response (`_attend_each`).

A model keeps the implementation once it is installed: gradient checkpointing looks it up again in the backward pass,
long after the forward. A call that brings no layout (generate, a plain forward) goes to transformers' own attention.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
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

    __slots__ = ("_masks", "_packed", "calls", "groups", "mask_windows", "segments", "windows")

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
        self._packed: Packed | None = None

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """True where a query may look, [queries, keys]: the last query at the last key. Made once for all layers."""
        key = (queries, keys, window, device)
        if key not in self._masks:
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            self._masks[key] = (distance >= 0) & (distance < (window or keys))
        return self._masks[key]

    def packed(self, device: torch.device) -> "Packed":
        """The same for one kernel over all segments. Made once for all layers."""
        if self._packed is None or self._packed.queries.device != device:
            segments = iter(self.segments)
            keys: list[Tensor] = []  # of each segment: where its keys lie in the row
            start = 0
            for prompt, count in self.groups:
                first, begin = next(segments), start
                keys.append(torch.arange(begin, begin + first))
                start += first
                for length in (next(segments) for _ in range(count - 1)):
                    keys += [torch.cat([torch.arange(begin, begin + prompt), torch.arange(start, start + length)])]
                    start += length
            lengths = [len(one) for one in keys]
            self._packed = Packed(
                rows=torch.cat(keys).to(device) if lengths != self.segments else None,
                queries=_cumulative(self.segments, device),
                keys=_cumulative(lengths, device),
                most_queries=max(self.segments),
                most_keys=max(lengths),
            )
        return self._packed


class Packed(NamedTuple):
    """A layout as one kernel takes it: segments by their cumulative lengths, int32 [segments + 1].

    Attributes:
        rows: which row of the keys each key of each segment is, [keys]; None where that is all of them in order.
        most_queries, most_keys: of one segment.
    """

    rows: Tensor | None
    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


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
    if softcap is None and _has_kernel(query):
        return _attend_packed(query, key, value, layout, scaling, sliding_window)
    return _attend_each(query, key, value, layout, scaling, sliding_window, softcap)


def _has_kernel(query: Tensor) -> bool:
    """Whether `varlen_attn` computes it: FlashAttention, in half precision."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or query.shape[-1] > 256:
        return False
    modern = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return modern and torch.backends.cuda.is_flash_attention_available()


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None, window: int | None
) -> Tensor:
    """One kernel over all segments; what it takes and returns is as of `_attend_row`.

    Each response's keys are laid behind its prompt's. They are laid again in the backward pass rather than kept, so
    that memory does not grow with the number of responses a prompt.
    """
    packed = layout.packed(query.device)

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if packed.rows is not None:
            keys, values = Laid.apply(keys, packed.rows), Laid.apply(values, packed.rows)
        out = varlen_attn(
            queries,
            keys,
            values,
            packed.queries,
            packed.keys,
            packed.most_queries,
            packed.most_keys,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),  # causal: the last query at the last key
            enable_gqa=keys.shape[1] != queries.shape[1],
        )
        assert isinstance(out, Tensor)
        return out

    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, H, d]
    if packed.rows is None:
        return attend(queries, keys, values)[None]
    return checkpoint(attend, queries, keys, values, use_reentrant=False, preserve_rng_state=False)[None]


class Laid(torch.autograd.Function):
    """Rows [n, ...] of a tensor, some of them several times; their gradients are summed in float32."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = tensor.shape[0]
        return tensor.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (rows,), (gradient,) = ctx.saved_tensors, gradients
        total = torch.zeros(ctx.count, *gradient.shape[1:], dtype=torch.float32, device=gradient.device)
        return total.index_add_(0, rows, gradient.float()).to(gradient.dtype), None


def _attend_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One SDPA call per segment; what it takes and returns is as of `_attend_row`."""

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return _attend(queries, keys, values, layout, scaling, window, softcap).transpose(1, 2)

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
