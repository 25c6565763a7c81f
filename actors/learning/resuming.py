"""Where a learner goes on, the same for all its workers: the newest checkpoint, once all of them see it; and what it
need not fail on, for it is started again."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from plumbline.errors import RunError

SHOWS_S = 60.0
"""Seconds after which a shared directory shows what another machine wrote."""


class Saved(Protocol):
    """What a `LearnerSpec` says of checkpoints."""

    @property
    def checkpoints(self) -> Path: ...

    def saved_step(self) -> int: ...


def newest_step(spec: Saved, acknowledged: int, everyones: Callable[[Any], list[Any]]) -> int:
    """Step of the newest checkpoint, the one that rank 0 sees.

    Args:
        acknowledged: the step up to which no part comes again; rank 0's counts.
        everyones: gives what each worker has, by rank; all of them call it.

    Raises:
        RunError: a worker does not see it, or it is older than what was acknowledged.
    """
    needed = everyones(acknowledged)[0]
    step = max(needed, everyones(_wait_for(spec, needed))[0])
    newest = min(everyones(_wait_for(spec, step)))
    if newest < step:
        raise RunError(
            f"{spec.checkpoints}: there is no checkpoint of step {step} to be seen on this machine, though it was "
            f"saved (the newest is of step {newest}); a learner's machines need a run directory that all of them "
            "see, or `storage_path`"
        )
    return step


def _wait_for(spec: Saved, step: int) -> int:
    """The newest checkpoint's step, waiting a while for one of `step` or later."""
    until = time.monotonic() + SHOWS_S
    while (newest := spec.saved_step()) < step and time.monotonic() < until:
        time.sleep(0.5)
    return newest


def lost_peer(error: Exception) -> bool:
    """Whether another worker went away in the middle of an exchange; Ray Train then starts all of them anew."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
