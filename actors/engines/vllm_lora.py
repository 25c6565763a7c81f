"""Adapters on vLLM's CPU backend, without harm to those who ask the base beside them.

There a request without an adapter has the index -1, and tensors are indexed by it: it gets the adapter in the *last*
slot, as soon as there is one and another request of the batch has an adapter. vLLM's GPU kernels leave such rows out.
Importing this in a worker's process, as a `worker_extension_cls`, puts that right before the model is loaded.
"""

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from actors.engines.vllm_worker import ReadsBack


class BaseApart(PunicaWrapperCPU):
    """What an adapter adds is nought for rows that have none: the small product of the two is cleared."""

    def _shrink_prefill(self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
        super()._shrink_prefill(y, x, w_t_all, scale)
        self._clear(y)

    def _shrink_decode(self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
        super()._shrink_decode(y, x, w_t_all, scale)
        self._clear(y)

    def _clear(self, y: torch.Tensor) -> None:
        indices = self.token_lora_indices
        y[: len(indices)].masked_fill_((indices < 0).unsqueeze(-1), 0)


class LeavesBase(ReadsBack):
    """Mixed into vLLM's worker, to which it adds no more: the import is what counts."""


def _wrapper(cls: type) -> str:
    return f"{BaseApart.__module__}.{BaseApart.__qualname__}"


type(current_platform).get_punica_wrapper = classmethod(_wrapper)  # type: ignore[assignment, method-assign]
