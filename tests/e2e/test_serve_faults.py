"""`kill -9` of each process of an endpoint that four users are asking: how many of them fail, and for how long.

`make test-faults` runs them. With PLUMBLINE_FAULTS=FILE it adds a row for each to that file: failed requests of all,
seconds until all four were answered again, and the longest that any request took to fail.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.guard import of_ray
from tests.endpoints import Users, free_port, served
from tests.runs import LIMIT_S, MARK, finish, kill, leftovers, start, tell
from tests.tiny import tiny_config

pytest.importorskip("vllm")
pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

KILLED = {
    "engine core": "EngineCore",
    "engine replica": ":engine",
    "endpoint replica": ":endpoint",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("serve-faults")
    config = tiny_config(directory, steps=2)
    config["fleet"] = {"engine": "transformers"}
    code, _, err = finish(start(directory, config))
    assert code == 0, err
    return directory


@pytest.fixture(scope="module")
def endpoint(finished: Path) -> Iterator[str]:
    with served(finished) as url:
        yield url


@pytest.mark.parametrize("what", KILLED)
def test_an_endpoint_heals_by_itself(finished: Path, endpoint: str, what: str) -> None:
    with Users(endpoint) as users:
        assert kill(finished, KILLED[what]) == 1
        healed = users.wait_for_answers(time.monotonic())
    tell_of(what, users, f"{healed:.1f}")


def tell_of(what: str, users: Users, healed: str) -> None:
    failed = users.failures()
    kinds = ", ".join(sorted({kind for _, _, kind in failed})) or "none"
    longest = max((took for _, took, _ in failed), default=0.0)
    slowest = max(took for user in users.all for _, took in user.answered)
    tell(what, f"{len(failed)} ({kinds}) | {healed} | {longest:.1f} | {slowest:.1f}")


def test_thirty_two_who_stream_meet_no_error(endpoint: str) -> None:
    """For two times 60 seconds."""
    for _ in range(2):
        with Users(endpoint, count=32, streams=True) as users:
            time.sleep(60)
        assert users.failures() == []
        assert all(len(user.answered) > 3 for user in users.all)


@pytest.mark.parametrize("what", ["raylet", "gcs_server"])
def test_an_endpoint_whose_ray_died_ends_and_hangs_nobody(finished: Path, tmp_path: Path, what: str) -> None:
    run_dir, port = tmp_path / "run", free_port()
    shutil.copytree(finished / "run", run_dir, ignore=shutil.ignore_patterns("serve.*"))
    command = [sys.executable, "-m", "cli", "serve", str(run_dir), "--port", str(port)]
    environment = os.environ | {MARK: str(tmp_path)}
    begun = subprocess.run([*command, "--detach"], cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert begun.returncode == 0, begun.stderr
    driver = int((run_dir / "serve.pid").read_text())
    with Users(f"http://127.0.0.1:{port}") as users:
        [process] = [one for one, words in of_ray(driver) if os.path.basename(words[0]) == what]
        process.kill()
        killed = time.monotonic()
        while "died" not in (log := (run_dir / "serve.log").read_text()):
            assert time.monotonic() < killed + LIMIT_S
            time.sleep(0.1)
        ended = time.monotonic() - killed
        time.sleep(5)  # they ask on
    assert all(user.failed and max(took for _, took, _ in user.failed) < 10 for user in users.all)
    assert log.endswith(
        f"plumbline: Ray's {what} died, and the endpoint with it\n"
        f"plumbline: start it again by: plumbline serve {run_dir}\n"
    )
    assert leftovers(tmp_path) == []
    tell_of(what, users, f"ends after {ended:.1f}")
