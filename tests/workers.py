"""Workers without Ray: processes of this machine that do the same work together, as a learner's do, over gloo."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def together(world: int, work: Callable[..., Any], *args: Any, seconds: float = 300) -> list[Any]:
    """``work(*args)`` on `world` workers at once; what each returns, by rank. `work` is a function of a module.

    Raises:
        AssertionError: one of them failed; with its error.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting:
        results = context.SimpleQueue()
        processes = [
            context.Process(target=_worker, args=(Path(meeting) / "m", rank, world, results, work, args), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            found: dict[int, Any] = {}
            while len(found) < world:
                rank, value, failed = results.get()
                assert not failed, f"worker {rank}: {value}"
                found[rank] = value
        finally:
            for process in processes:
                process.kill()
                process.join()
    return [found[rank] for rank in range(world)]


def _worker(meeting: Path, rank: int, world: int, results: Any, work: Callable[..., Any], args: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", f"file://{meeting}", timedelta(seconds=300), rank=rank, world_size=world)
        results.put((rank, work(*args), False))
    except BaseException as error:
        results.put((rank, repr(error), True))
        raise
    dist.barrier()
