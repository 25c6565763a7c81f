"""Whole weights for other processes of the same card: they read them where a learner laid them out (CUDA IPC).

Nobody is waited for. A reader copies a tensor before it looks at it, and finds by the version's digests whether the
learner wrote the next version meanwhile, or has died; then it reads the version's files.
"""

import pickle
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from plumbline.records import SharedWeights

DEVICE = 6
"""Which argument of `rebuild_cuda_tensor` is the card's number, which is each process's own."""


def card_of(device: torch.device) -> str:
    """The name of a card, the same in all processes; a machine's, for its CPUs."""
    if device.type != "cuda":
        return f"{device.type} of {socket.gethostname()}"
    return str(torch.cuda.get_device_properties(device).uuid)


class Shelf:
    """Memory that holds one version at a time, for as long as this process lives."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: Tensor | None = None
        self._handle = b""

    def lay(self, weights: Iterable[tuple[str, Tensor]]) -> SharedWeights:
        """Copy a version's weights, of one dtype, over those of the last; the same names and shapes each time."""
        named = dict(weights)
        if self._flat is None:
            dtype = next(iter(named.values())).dtype
            self._flat = torch.empty(sum(w.numel() for w in named.values()), dtype=dtype, device=self._device)
            # Once: who opens it and closes it again leaves it as it was, however often.
            self._handle = bytes(ForkingPickler.dumps(reduce_tensor(self._flat)))
        shapes = {name: tuple(weight.shape) for name, weight in named.items()}
        with torch.no_grad():
            for place, weight in zip(_cut(self._flat, shapes), named.values(), strict=True):
                place.copy_(weight)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # another process's streams do not wait for ours
        return SharedWeights(card=card_of(self._device), handle=self._handle, shapes=shapes)


def open_shared(shared: SharedWeights, device: torch.device) -> Iterator[tuple[str, Tensor]] | None:
    """Copies of the weights by name, one at a time; None where they are on another card, or are there no more."""
    if shared.card != card_of(device):
        return None
    try:
        rebuild, arguments = pickle.loads(shared.handle)  # from a learner of ours, through Ray; never from disk
        if rebuild is rebuild_cuda_tensor:
            arguments = (*arguments[:DEVICE], device.index, *arguments[DEVICE + 1 :])
        flat: Tensor = rebuild(*arguments)
    except (RuntimeError, OSError):
        return None
    places = _cut(flat, shared.shapes)
    return ((name, place.clone()) for name, place in zip(shared.shapes, places, strict=True))


def _cut(flat: Tensor, shapes: Mapping[str, Sequence[int]]) -> Iterator[Tensor]:
    """The tensors that lie one behind the other."""
    sizes = [prod(shape) for shape in shapes.values()]
    for shape, size, end in zip(shapes.values(), sizes, accumulate(sizes), strict=True):
        yield flat[end - size : end].view(tuple(shape))
