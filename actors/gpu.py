"""What the GPUs of a process do: how busy they are, and how much of their memory is taken, by whomever.

Learners and generators watch their own. Without a GPU, or without NVML's bindings, there is nothing to see, and
nothing is told.
"""

import importlib.util
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

EVERY = 1.0
"""Seconds between two samples. NVML's own figure is the share of about the last second."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuUse:
    """Sums over all samples since a process began, so that several may ask what was since they asked last.

    Attributes:
        busy: shares of time in which a kernel ran, 0 to 1 a sample; a mean over the process's cards.
        gib: memory taken; a mean over the process's cards.
    """

    samples: int = 0
    busy: float = 0.0
    gib: float = 0.0

    def since(self, before: "GpuUse") -> dict[str, float]:
        """Means over the samples after `before`: `gpu_busy` and `gpu_gib`; empty without any."""
        count = self.samples - before.samples
        if count <= 0:
            return {}
        return {"gpu_busy": (self.busy - before.busy) / count, "gpu_gib": (self.gib - before.gib) / count}


class GpuWatch:
    """Samples the cards that this process may use, in a thread, for as long as the process lives."""

    def __init__(self) -> None:
        self.use = GpuUse()
        if importlib.util.find_spec("pynvml") is None:
            return
        import torch

        if cards := torch.cuda.device_count():
            threading.Thread(target=self._run, args=(cards,), name="gpu", daemon=True).start()

    def _run(self, cards: int) -> None:
        try:
            while True:
                self.sample(cards)
                time.sleep(EVERY)
        except Exception as error:  # a driver that does not tell, as of a slice of a card; no run needs it
            log.warning("GPUs are not watched: %s", error)

    def sample(self, cards: int) -> None:
        """Add one sample."""
        import torch

        busy = sum(torch.cuda.utilization(card) for card in range(cards)) / (100 * cards)
        gib = sum(torch.cuda.device_memory_used(card) for card in range(cards)) / (2**30 * cards)
        before = self.use
        self.use = GpuUse(samples=before.samples + 1, busy=before.busy + busy, gib=before.gib + gib)


def mean_use(before: Mapping[object, GpuUse], after: Mapping[object, GpuUse]) -> dict[str, float]:
    """`GpuUse.since`, a mean over the processes that were there before and after; empty where none has a GPU."""
    found = [figures for one, use in after.items() if one in before and (figures := use.since(before[one]))]
    return {key: sum(one[key] for one in found) / len(found) for key in (found or [{}])[0]}
