"""What a plan places processes on: the GPUs, processors and memory of this machine, or of a cluster's nodes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is to place on.

    Attributes:
        gpus: all of them.
        gib: memory of the smallest.
        per_node: GPUs of the smallest node that has any: no engine goes over more.
        ram_gib: free memory; of a cluster it is not asked.
        cluster: nodes of a Ray that runs already, which may grow.
        blind: what each of those nodes offers that do not see the run's directory.
    """

    gpus: int
    gib: float
    cpus: int
    ram_gib: float
    per_node: int
    cluster: bool = False
    blind: tuple[Mapping[str, float], ...] = ()


def this_machine() -> Machine:
    """The machine of this process."""
    import psutil
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(
        gpus=gpus,
        gib=min((gpu_gib(i) for i in range(gpus)), default=0.0),
        cpus=os.cpu_count() or 1,
        ram_gib=psutil.virtual_memory().available / 2**30,
        per_node=gpus,
    )


def gpu_gib(index: int) -> float:
    """All memory of a GPU of this machine."""
    import torch

    return torch.cuda.get_device_properties(index).total_memory / 2**30
