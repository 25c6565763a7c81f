"""What all tests share: where the real data and models are, when this machine has them. pytest loads it."""

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of transformers: no test waits for a network
if "PYTEST_XDIST_WORKER" in os.environ:  # each has a processor: threads of its own would only get in one another's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Directory of real data and models beside the checkout; a test that needs it is skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no real data and models at {SHARED} (they are not part of the repository)")
    return SHARED
