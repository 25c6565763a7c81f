"""The port that a learner's workers meet on."""

import errno
import socket
import subprocess
import sys
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train import TrainingFailedError
from ray.train.torch import TorchConfig
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from actors.learning.learner import ended
from actors.learning.meeting import HeldPort, hold_port
from plumbline.errors import LostError, RunError


def test_nobody_else_can_take_it() -> None:
    _, port = hold_port()
    with pytest.raises(OSError) as caught, socket.socket() as other:
        other.bind(("", port))
    assert caught.value.errno == errno.EADDRINUSE


def test_workers_meet_on_it() -> None:
    """Ray Train tells them by the environment."""
    code = """
import os, torch
import torch.distributed as dist
from actors.learning.meeting import hold_port

address, port = hold_port()
os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
if os.fork() == 0:
    dist.init_process_group("gloo", init_method="env://", rank=1, world_size=2)
    dist.all_reduce(torch.ones(1))
    os._exit(0)
dist.init_process_group("gloo", init_method="env://", rank=0, world_size=2)
total = torch.ones(1)
dist.all_reduce(total)
print(int(total))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert said.stdout == "2\n", said.stderr


def test_ray_train_chooses_it_where_ours_is_put_in_place() -> None:
    backend: Any = TorchConfig().backend_cls
    assert issubclass(HeldPort().backend_cls, backend)
    assert "get_address_and_port" in backend.on_start.__code__.co_names


SHORT = OutOfMemoryError("Memory on the node (IP: 10.0.0.1, ID: 76) was 22.5GB used / 23.5GB limit (0.957)")


def test_a_worker_that_is_gone_for_want_of_memory_is_no_failure_of_the_shutdown() -> None:
    """Ray Train would give the run up, in place of starting the worker again."""

    class Gone:
        def __len__(self) -> int:
            return 1

        def execute_async(self, *_: object, **__: object) -> None:
            raise SHORT

    HeldPort().backend_cls().on_shutdown(Gone(), HeldPort())


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (ControllerError(SHORT), LostError, "the learner of ple ended: Ray ended a process for want of memory"),
        (
            WorkerGroupError("…", {0: SHORT}),
            RunError,
            "the learner of ple ended: Ray ended a process for want of memory",
        ),
        (ControllerError(ValueError("no")), RunError, "the learner of ple ended: ControllerError: "),
    ],
)
def test_a_learner_that_ended_for_want_of_memory_says_so(error: TrainingFailedError, kind: type, told: str) -> None:
    found = ended("ple", error)
    assert type(found) is kind
    assert str(found).startswith(told)
