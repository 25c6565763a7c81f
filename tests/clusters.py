"""Clusters that tests start as users do, by `ray start` or `ray up`, and talk to by `ray job`; no trace is left."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.runs import MARK

PATIENCE_S = 600
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Head:
    """A cluster with ports, a token and files of its own; `environment` reaches it."""

    address: str
    environment: dict[str, str]

    def job(self, verb: str, *arguments: str, **options: str) -> subprocess.Popen[str]:
        """`ray job VERB`, both outputs in one."""
        command = [str(BIN / "ray"), "job", verb, "--address", self.address, *arguments]
        return subprocess.Popen(
            command, env=self.environment | options, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def wait(self, starting: subprocess.Popen[bytes], log: Path) -> None:
        """Until it takes jobs; `starting` is the process that brings it up."""
        deadline = time.monotonic() + PATIENCE_S
        while (listing := self.job("list")).wait() != 0:
            assert not starting.poll(), log.read_text()
            assert time.monotonic() < deadline, listing.communicate()
            time.sleep(1)

    def log_once(self, job: str, ended: str) -> str:
        """A job's log once its status is `ended`."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            told = self.job("status", job).communicate(timeout=PATIENCE_S)[0].lower()
            if ended in told:
                return self.job("logs", job).communicate(timeout=PATIENCE_S)[0]
            over = re.search("failed|succeeded|stopped", told)
            assert not over, self.job("logs", job).communicate(timeout=PATIENCE_S)[0]
            assert time.monotonic() < deadline, told
            time.sleep(1)


@contextlib.contextmanager
def own_environment() -> Iterator[dict[str, str]]:
    """Variables of a cluster with files and a token of its own; at the end all its processes and files are removed."""
    temporary = tempfile.mkdtemp(prefix="plumb", dir="/tmp")  # sockets in it must have short names
    keep = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    try:
        yield keep | {
            MARK: temporary,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # the image has `plumbline` in its path too
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_TMPDIR": temporary,
        }
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = marked(temporary)
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)
            psutil.wait_procs(left, timeout=20)
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def another_ray() -> Iterator[str]:
    """`ray start --head` as a user of this machine does, beside whatever else runs there; its address."""
    with own_environment() as environment:
        port, dashboard, agent, metrics, client = free_ports(5)
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=1", f"--port={port}"]
        command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        command += [f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}"]
        user = {key: value for key, value in environment.items() if not key.startswith("RAY_")}
        with (Path(environment["RAY_TMPDIR"]) / "head.log").open("wb") as log:
            starting = subprocess.Popen(command, env=user, stdout=log, stderr=log)
        # It asks for the user's token, which the run beside it made if there was none; `ray job` has to be told so.
        head = Head(address=f"http://127.0.0.1:{dashboard}", environment=user | {"RAY_AUTH_MODE": "token"})
        head.wait(starting, Path(log.name))
        yield f"127.0.0.1:{port}"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def marked(mark: str) -> list[psutil.Process]:
    """All processes that the cluster started, and those that they did."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found
