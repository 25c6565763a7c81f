"""Adapters on CPUs: what vLLM's own computes a token at a time, and nothing for tokens without one."""

import pytest
import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from actors.engines.vllm_lora import OncePerAdapter, parts

SLICES, RANK, INPUTS = (6, 2, 2), 4, 5


class Mapping:
    """As vLLM's `LoRAMapping`, of single tokens."""

    def __init__(self, ids: list[int], prefill: bool) -> None:
        self.index_mapping = self.prompt_mapping = tuple(ids)
        self.is_prefill = prefill


def computed(kind: type[PunicaWrapperCPU], ids: list[int], prefill: bool, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    a = tuple(random(3, 1, RANK, INPUTS) for _ in SLICES)
    b = tuple(random(3, 1, size, RANK) for size in SLICES)
    wrapper = kind(32, 32, "cpu")
    wrapper.update_metadata(Mapping(ids, prefill), [7, 8, 9], 3, 11)  # type: ignore[arg-type]
    y = random(len(ids), sum(SLICES))
    wrapper.add_lora_linear(y, random(len(ids), INPUTS), a, b, 0.5, SLICES)
    return y


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("ids", [[7, 7, 7], [9, 8, 7, 9], [8, 8, 9, 9, 9], [9]])
def test_it_is_what_vllm_computes(ids: list[int], dtype: torch.dtype, near: float, prefill: bool) -> None:
    own, theirs = (computed(kind, ids, prefill, dtype) for kind in (OncePerAdapter, PunicaWrapperCPU))
    assert torch.allclose(own, theirs, atol=near)


@pytest.mark.parametrize("prefill", [True, False])
def test_tokens_without_an_adapter_are_left_as_they_are(prefill: bool) -> None:
    ids = [0, 9, 0, 9, 8, 0]
    with_some, plain = (computed(OncePerAdapter, one, prefill, torch.float32) for one in (ids, [0] * len(ids)))
    changed = (with_some != plain).any(dim=1).tolist()
    assert changed == [one != 0 for one in ids]


def test_runs_of_tokens_are_slices() -> None:
    assert parts(torch.tensor([-1, 1, 1, -1])) == ((1, slice(1, 3)),)
    assert parts(torch.tensor([-1, -1])) == ()
    [(first, rows), (second, run)] = parts(torch.tensor([0, 2, 0]))
    assert (first, second, run) == (0, 2, slice(1, 2)) and rows.tolist() == [0, 2]  # type: ignore[union-attr]


def test_an_adapter_that_is_cut_among_engines_leaves_them_too() -> None:
    wrapper = OncePerAdapter(32, 32, "cpu")
    wrapper.update_metadata(Mapping([0, 9, 0], False), [7, 8, 9], 3, 11)  # type: ignore[arg-type]
    small = torch.zeros(1, 3, RANK)
    wrapper.add_shrink(small, torch.ones(3, INPUTS), (torch.ones(3, 1, RANK, INPUTS),), 0.5)
    assert small[0].tolist() == [[0.0] * RANK, [0.5 * INPUTS] * RANK, [0.0] * RANK]
