"""What is left to do where a run's own process was killed: by `kill -9`, for its memory, or by Ray, whose raylet died.

`guarded` starts a small process beside the run, which hears by a pipe how the run ended. Where nobody said goodbye it
ends what Ray left behind, for some of it would stay for minutes, and says how to go on.
"""

import contextlib
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

GOODBYE = b"goodbye"
RAYS_OWN = ("gcs_server", "raylet")
LOOK_S = 2.0
"""Between two looks at them: what is left at the end does not say which of them took the other with it."""


@contextlib.contextmanager
def guarded(run_dir: Path) -> Iterator[None]:
    """Watch over this process until the block ends, however it does."""
    # By its path: the working directory may have a package of our name. In a session of its own: Ctrl-C is the run's.
    command = [sys.executable, "-P", __file__, str(run_dir), str(os.getpid())]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            guard.communicate(GOODBYE)


def watch(run_dir: str, driver: int) -> None:
    """Wait until the process `driver` says goodbye, or is gone."""
    own: dict[str, psutil.Process] = {}
    died = ""
    while not select.select([sys.stdin], [], [], LOOK_S)[0]:
        own = own or rays_own(driver)
        died = died or first_gone(own)
    if sys.stdin.buffer.read() == GOODBYE:
        return
    died = died or first_gone(own)
    what = f"Ray's {died} died, and the run with it" if died else "the run was killed, or Ray under it"
    sweep(driver)
    print(f"plumbline: {what}; all steps that are done are saved", file=sys.stderr)
    print(f"plumbline: continue with: plumbline resume {run_dir}", file=sys.stderr)


def rays_own(driver: int) -> dict[str, psutil.Process]:
    """The two processes that the Ray that `driver` started cannot live without, once both are there."""
    named = {os.path.basename(words[0]): process for process, words in of_ray(driver)}
    return {name: named[name] for name in RAYS_OWN} if named.keys() >= set(RAYS_OWN) else {}


def first_gone(own: Mapping[str, psutil.Process]) -> str:
    """The name of one that has ended; the other ends some time after it."""
    for name, process in own.items():
        try:
            ended = process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            ended = True
        if ended:
            return name
    return ""


def sweep(driver: int) -> None:
    """End the processes of the Ray that `driver` started."""
    for process, _ in of_ray(driver):
        with contextlib.suppress(psutil.Error):
            process.kill()


def of_ray(driver: int) -> list[tuple[psutil.Process, list[str]]]:
    """The processes of the Ray that `driver` started, which it named after itself, with their command lines."""
    session, found = re.compile(rf"session_[\d_-]+_{driver}\b"), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if any(session.search(word) for word in words):
                found.append((process, words))
    return found


if __name__ == "__main__":
    watch(sys.argv[1], int(sys.argv[2]))
