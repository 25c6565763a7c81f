"""Endpoints that tests start as users do, and ask by OpenAI's client."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.runs import LIMIT_S, MARK

KEY = "sk-a-key-of-the-tests"
TURN: list[Any] = [{"role": "user", "content": "Could you tell me what the goat eats?"}]


def client(url: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{what}: not in time"
        time.sleep(0.2)


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def first_logprob(talker: openai.OpenAI, name: str) -> tuple[str, float]:
    """The version that answered, and the log-prob of its likeliest first token: it tells versions apart."""
    raw = talker.chat.completions.with_raw_response.create(
        model=name, messages=TURN, temperature=0, max_tokens=1, logprobs=True
    )
    answer: Any = raw.parse()
    assert answer.model == raw.headers["x-plumbline-version"]
    return answer.model, answer.choices[0].logprobs.content[0].logprob


@contextlib.contextmanager
def served(directory: Path, *options: str) -> Iterator[str]:
    """`plumbline serve` over `directory/run`, in a process that is left running; its address."""
    port, environment = free_port(), os.environ | {MARK: str(directory)}
    command = [sys.executable, "-m", "cli", "serve", str(directory / "run")]
    arguments = [*command, "--port", str(port), *options, "--detach"]
    begun = subprocess.run(arguments, cwd=directory, env=environment, text=True, capture_output=True)
    assert begun.returncode == 0, begun.stderr
    yield f"http://127.0.0.1:{port}"
    ended = subprocess.run([*command, "--stop"], env=environment, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stderr


@dataclass
class User:
    """Asks without a pause, and keeps when each request began and how long it took to be answered, or to fail."""

    talker: openai.OpenAI
    """Which does not try again by itself."""
    model: str
    streams: bool
    answered: list[tuple[float, float]] = field(default_factory=list)
    failed: list[tuple[float, float, str]] = field(default_factory=list)

    def ask(self, over: threading.Event) -> None:
        while not over.is_set():
            began = time.monotonic()
            try:
                self._once()
                self.answered.append((began, time.monotonic() - began))
            except (openai.OpenAIError, httpx.HTTPError) as error:  # the second of a stream that was cut off
                self.failed.append((began, time.monotonic() - began, type(error).__name__))
                time.sleep(0.25)

    def _once(self) -> None:
        create = self.talker.chat.completions.create
        if not self.streams:
            create(model=self.model, messages=TURN, max_tokens=16)
            return
        pieces = list(create(model=self.model, messages=TURN, max_tokens=16, stream=True))
        if not pieces or pieces[-1].choices[0].finish_reason is None:
            raise openai.OpenAIError("a stream that was cut off without a word")


@dataclass
class Users:
    """So many who ask for as long as the block is, every second of them by a stream, or all."""

    url: str
    count: int = 4
    model: str = "ple"
    key: str = KEY
    streams: bool = False
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Users":
        self.all = [
            User(client(self.url, self.key), self.model, streams=self.streams or bool(i % 2)) for i in range(self.count)
        ]
        self._threads = [threading.Thread(target=user.ask, args=(self.over,)) for user in self.all]
        for thread in self._threads:
            thread.start()
        self.wait_for_answers(time.monotonic())
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive(), "a request hangs"

    def wait_for_answers(self, since: float) -> float:
        """Until each of them has two answers to what it asked after `since`; returns the seconds."""
        while any(len([1 for began, _ in user.answered if began > since]) < 2 for user in self.all):
            assert time.monotonic() < since + LIMIT_S, [user.failed[-1:] for user in self.all]
            time.sleep(0.05)
        return time.monotonic() - since

    def failures(self) -> list[tuple[float, float, str]]:
        return [one for user in self.all for one in user.failed]
