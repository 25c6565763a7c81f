"""Where the workers of a learner meet: on a port that the first of them listens on from the moment it is chosen.

Ray Train (2.60) has a worker find a free port in one call and listen on it in a later one. Where learners start
together, another process may have taken it by then: the learner ended with EADDRINUSE, and its place was never freed.
"""

import contextlib
from typing import Any
from unittest import mock

import ray
from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch import config as ray_config
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from actors.lost import GONE

_held: TCPStore | None = None


class HeldPort(TorchConfig):
    """Ray Train's own settings of torch's process group, but for the port."""

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(TorchConfig().backend_cls):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        with mock.patch.object(ray_config, "get_address_and_port", hold_port):  # of the first worker
            super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Ray Train (2.60) expects that workers are gone, but not that one was ended for want of memory."""
        with contextlib.suppress(*GONE):
            super().on_shutdown(worker_group, backend_config)


def hold_port() -> tuple[str, int]:
    """This machine's address, and a port of its own that this process listens on from now on.

    torch's rendezvous finds that the process has a store on it, and uses that.
    """
    global _held
    address = ray.util.get_node_ip_address()
    _held = TCPStore(address, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    return address, _held.port
