"""What is left to do where a run's own process was killed: by `kill -9`, for its memory, or by Ray, whose raylet died.

`guarded` starts a small process beside the run, which hears by a pipe how the run ended. Where nobody said goodbye it
ends what Ray left behind, for some of it would stay for minutes, and says how to go on.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

GOODBYE = b"goodbye"


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
    if sys.stdin.buffer.read() == GOODBYE:
        return
    sweep(driver)
    print("plumbline: the run was killed, or Ray under it; all steps that are done are saved", file=sys.stderr)
    print(f"plumbline: continue with: plumbline resume {run_dir}", file=sys.stderr)


def sweep(driver: int) -> None:
    """End the processes of the Ray that `driver` started, which it named after itself."""
    import psutil

    session = re.compile(rf"session_[\d_-]+_{driver}\b")
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(session.search(word) for word in process.cmdline()):
                process.kill()


if __name__ == "__main__":
    watch(sys.argv[1], int(sys.argv[2]))
