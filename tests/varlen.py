"""What `torch.nn.attention.varlen.varlen_attn` computes, on a CPU: a segment at a time, as its documentation says."""

import torch
from torch import Tensor


class Varlen:
    """Stands in for the kernel, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        """[Tq, H, d] queries, [Tk, H or fewer, d] keys and values -> [Tq, H, d]."""
        self.calls += 1
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        of_queries, of_keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
        assert (max(of_queries), max(of_keys)) == (max_q, max_k)
        assert enable_gqa or query.shape[1] == key.shape[1]
        repeats = query.shape[1] // key.shape[1]
        left, right = window_size
        out = []
        pieces = (query.split(of_queries), key.split(of_keys), value.split(of_keys))
        for queries, keys, values in zip(*pieces, strict=True):
            own = torch.arange(len(keys) - len(queries), len(keys))[:, None]  # the last query is at the last key
            other = torch.arange(len(keys))[None]
            seen = (other >= own - left if left >= 0 else torch.ones_like(other - own, dtype=torch.bool)) & (
                other <= own + right if right >= 0 else torch.ones_like(other - own, dtype=torch.bool)
            )
            keys, values = (x.repeat_interleave(repeats, dim=1) for x in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * (query.shape[-1] ** -0.5 if scale is None else scale)
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), values))
        return torch.cat(out)
