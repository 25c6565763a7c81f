"""What is left to do where a command's own process was killed, or Ray under it.

`guarded` starts a small process beside it, which hears by a pipe how the command ended. Where nobody said goodbye it
ends what Ray left behind, for some of it would stay for minutes, and says how to go on. A Ray whose raylet or GCS died
answers no more, and whoever waits for it waits for ever: the command ends then, in the middle of whatever it does.
"""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

GOODBYE = b"goodbye"
RAYS_OWN = ("gcs_server", "raylet")
LOOK_S = 1.0
"""Between two looks at them."""


@contextlib.contextmanager
def guarded(what: str, *then: str) -> Iterator[None]:
    """Watch over this process until the block ends, however it does.

    Args:
        what: this process is, in a message's words, such as ``run``.
        then: the last lines of a command that did not end by itself: how to go on.
    """
    # By its path: the working directory may have a package of our name. A session of its own: Ctrl-C is for this one.
    command = [sys.executable, "-P", __file__, str(os.getpid()), what, *then]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    ended = threading.Event()
    looking = threading.Thread(target=look, args=(guard, ended), daemon=True)
    looking.start()
    try:
        yield
    finally:
        ended.set()
        looking.join()
        with contextlib.suppress(OSError):
            guard.communicate(GOODBYE)


def run_guard(run_dir: Path) -> contextlib.AbstractContextManager[None]:
    """`guarded`, of a run."""
    return guarded("run", "all steps that are done are saved", f"continue with: plumbline resume {run_dir}")


def look(guard: "subprocess.Popen[bytes]", ended: threading.Event) -> None:
    """End this process, in its own thread, once the Ray that it started has lost one of `RAYS_OWN`."""
    if os.environ.get("RAY_ADDRESS"):  # it starts none
        return
    own: dict[str, psutil.Process] = {}
    while not ended.wait(LOOK_S):
        own = own or rays_own(os.getpid())
        died = first_gone(own)
        if died and sys.modules["ray"].is_initialized():  # else it was stopped
            with contextlib.suppress(OSError):
                guard.communicate(died.encode())
            os._exit(1)


def watch(driver: int, what: str, *then: str) -> None:
    """Wait until the process `driver` says goodbye, says what of Ray's has died, or is gone."""
    said = sys.stdin.buffer.read()
    if said == GOODBYE:
        return
    sweep(driver)
    died = f"Ray's {said.decode()} died, and the {what} with it" if said else f"the {what} was killed, or Ray under it"
    print(*(f"plumbline: {line}" for line in (died, *then)), sep="\n", file=sys.stderr)


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
    watch(int(sys.argv[1]), *sys.argv[2:])
