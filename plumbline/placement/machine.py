"""What a plan places processes on: the GPUs, processors and memory of this machine, or of a cluster's nodes."""

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


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


@contextlib.contextmanager
def sign_in(directory: Path | None) -> Iterator[Path | None]:
    """A file where `directory` is, or will be, by which others find whether they see that place. None where there is
    nothing to see, or it cannot be written, which is refused by itself."""
    if directory is None:
        yield None
        return
    place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    sign = place / f".plumbline-{uuid.uuid4().hex}"
    try:
        sign.touch()
    except OSError:
        yield None
        return
    try:
        yield sign
    finally:
        sign.unlink()
