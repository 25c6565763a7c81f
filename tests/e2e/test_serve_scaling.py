"""An endpoint over whole weights: versions roll over while users ask, and engines of its own follow the load."""

import threading
import time
from pathlib import Path

import openai
import pytest

from tests.endpoints import KEY, TURN, client, first_logprob, free_port, healthy, served, wait_until
from tests.runs import events, finish, leftovers, start, titled, wait_for
from tests.tiny import tiny_config

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1500)]
STEPS = 16
PATIENCE_S = 300
ENGINE = ":engine"
"""What the titles of its processes have, after the name of the application."""


class Users:
    """So many who ask `name` again and again until the block ends; what answered them, and what failed."""

    def __init__(self, url: str, count: int, name: str, max_tokens: int = 16) -> None:
        self.versions: list[str] = []
        self.failures: list[str] = []
        self._url, self._name, self._max_tokens = url, name, max_tokens
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(count)]

    def __enter__(self) -> "Users":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        talker = client(self._url)
        while not self._over.is_set():
            try:
                answer = talker.chat.completions.create(model=self._name, messages=TURN, max_tokens=self._max_tokens)
                self.versions.append(answer.model)
            except openai.OpenAIError as error:
                self.failures.append(repr(error))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of whole weights that users were asking while it trained; its alias follows every version."""
    directory = tmp_path_factory.mktemp("whole")
    config = tiny_config(directory, batch_size=4, policy={"type": "full"}, learner={"lr": 1e-3, "batch_size": 4})
    (directory / "keys").write_text(KEY + "\n")
    port = free_port()
    config["serve"] = {"enabled": True, "port": port, "api_keys": str(directory / "keys")}
    process = start(directory, config)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: healthy(url), process, "the endpoint")
        with Users(url, 2, "ple") as users:
            wait_for(directory, process, STEPS - 2)
        code, _, err = finish(process)
    finally:
        process.kill()
    assert code == 0, err
    assert users.failures == []
    asked = [int(version.partition("@")[2] or 0) for version in users.versions]
    assert len(set(asked)) >= 4, f"they were answered by few versions: {users.versions}"
    assert len(events(directory)) == STEPS
    assert leftovers(directory) == []
    return directory


def test_versions_are_asked_in_turn(ended: Path) -> None:
    """Each answers as itself, whatever was loaded before."""
    with served(ended, "--api-keys", str(ended / "keys")) as url:
        talker = client(url)
        names = ["base", f"ple@{STEPS - 1}", f"ple@{STEPS}"]
        once = {name: first_logprob(talker, name) for name in names}
        assert {name: version for name, (version, _) in once.items()} == {name: name for name in names}
        assert len({round(value, 4) for _, value in once.values()}) == len(names)
        assert {name: first_logprob(talker, name) for name in reversed(names)} == once
        with Users(url, 2, names[0]) as some, Users(url, 2, names[2]) as others:
            time.sleep(10)
        assert some.failures == others.failures == []
        assert set(some.versions) == {names[0]} and set(others.versions) == {names[2]}
    assert leftovers(ended) == []


def test_engines_follow_the_load(ended: Path) -> None:
    with served(ended, "--api-keys", str(ended / "keys"), "--replicas", "1", "2") as url:
        assert len(titled(ended, ENGINE)) == 1
        deadline = time.monotonic() + PATIENCE_S
        with Users(url, 48, "ple", max_tokens=48) as users:
            while len(titled(ended, ENGINE)) < 2:
                assert time.monotonic() < deadline, f"no second engine; {len(users.versions)} answers"
                time.sleep(1)
            begun = len(users.versions)
            while len(users.versions) < begun + 500:
                assert time.monotonic() < deadline, f"{len(users.versions) - begun} answers of two engines"
                time.sleep(0.5)
        assert users.failures == [] and set(users.versions) == {f"ple@{STEPS}"}
    assert leftovers(ended) == []
