"""The port that a learner's workers meet on."""

import errno
import socket
import subprocess
import sys
from typing import Any

import pytest
from ray.train.torch import TorchConfig

from actors.learning.meeting import HeldPort, hold_port


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
