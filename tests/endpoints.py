"""Endpoints that tests start as users do, and ask by OpenAI's client."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
