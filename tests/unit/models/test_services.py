"""Rewards behind HTTP, against a server of this process: what is asked, what comes of it, and ten ways to fail."""

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pytest

from plumbline.config.data import HttpReward, JudgeReward
from plumbline.errors import ConfigError
from plumbline.models.services import Service, open_service
from plumbline.records import Message, ScoreRequest

Answer = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Answers as its server is told to, and keeps what it was asked."""

    server: "Server"  # type: ignore[assignment]

    def do_POST(self) -> None:
        """Any POST."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.asked.append((self.path, body, self.headers.get("authorization")))
            answer = self.server.answers.pop(0) if self.server.answers else self.server.otherwise
        answer(self, body)

    def send(self, status: int, content: Any, **headers: str) -> None:
        """A whole answer; `content` is JSON, or bytes as they are."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Not on the screen."""


class Server(ThreadingHTTPServer):
    """A reward that gives each answer its length; `answers` come before, one a request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = Lock()
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.answers: list[Answer] = []
        self.otherwise: Answer = lambda to, body: to.send(200, {"scores": [len(one) for one in body["answers"]]})

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    thread = Thread(target=one.serve_forever, daemon=True)
    thread.start()
    yield one
    one.shutdown()
    one.server_close()


def requests(*answers: str) -> list[ScoreRequest]:
    turns = (Message(role="system", content="Be kind."), Message(role="user", content="What do bees make?"))
    return [ScoreRequest(messages=turns, response=answer, extra={"label": 1}) for answer in answers]


def http(server: Server, directory: Path | None = None, **settings: Any) -> Service:
    quick: dict[str, Any] = {"type": "http", "url": f"{server.url}/score", "backoff_s": 0.01, "retries": 2}
    return open_service(HttpReward(**{**quick, **settings}), str(directory) if directory else None)


def test_a_batch_is_queries_and_answers_and_comes_back_in_order(server: Server) -> None:
    service = http(server, batch_size=2)
    assert service.score(requests("a", "ccc", "bb")) == ([1.0, 3.0, 2.0], "")
    bodies = sorted((body for _, body, _ in server.asked), key=lambda body: body["answers"])
    assert [body["answers"] for body in bodies] == [["a", "ccc"], ["bb"]]
    assert bodies[1]["queries"] == ["What do bees make?"] and bodies[1]["extra"] == [{"label": 1}]
    assert bodies[1]["messages"][0][0] == {"role": "system", "content": "Be kind."}


def test_what_was_answered_is_not_asked_again_by_another_process_either(server: Server, tmp_path: Path) -> None:
    assert http(server, tmp_path).score(requests("a", "bb", "a"))[0] == [1.0, 2.0, 1.0]
    again = http(server, tmp_path)
    assert again.score(requests("bb", "ccc"))[0] == [2.0, 3.0]
    assert sorted(one for _, body, _ in server.asked for one in body["answers"]) == ["a", "bb", "ccc"]
    assert (again.cost.asked, again.cost.cached, again.cost.requests) == (2, 1, 1)
    assert http(server, tmp_path, cache=False).score(requests("bb"))[0] == [2.0]
    assert len(server.asked) == 3


def broken(to: Handler, body: dict[str, Any]) -> None:
    """An answer that ends before it is whole."""
    to.send_response(200)
    to.send_header("content-length", "1000")
    to.end_headers()
    to.wfile.write(b'{"scores": [')
    to.close_connection = True


def hung_up(to: Handler, body: dict[str, Any]) -> None:
    """No answer at all."""
    to.close_connection = True
    to.connection.close()


WAYS: dict[str, tuple[Answer, str]] = {
    "server error": (lambda to, body: to.send(500, {"error": "out of memory"}), "500 .*out of memory"),
    "busy": (lambda to, body: to.send(503, b"", retry_after="0"), "503"),
    "too many": (lambda to, body: to.send(429, {}, retry_after="0.01"), "429"),
    "no JSON": (lambda to, body: to.send(200, b"<html>"), "Expecting value"),
    "no scores": (lambda to, body: to.send(200, {"score": [1]}), 'no list "scores"'),
    "one score less": (lambda to, body: to.send(200, {"scores": []}), "0 scores for 1 answers"),
    "not finite": (lambda to, body: to.send(200, b'{"scores": [NaN]}'), "no finite number"),
    "not a number": (lambda to, body: to.send(200, {"scores": ["good"]}), "no finite number"),
    "cut off": (broken, "RemoteProtocolError|peer closed|ReadError"),
    "hung up": (hung_up, "disconnected|ReadError|reset"),
    "slow": (lambda to, body: time.sleep(1.5), "Timeout"),
    "not UTF-8": (lambda to, body: to.send(200, b"\xff\xfe{"), "codec|decode"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_fails_once_is_tried_again(server: Server, way: str) -> None:
    server.answers = [WAYS[way][0]]
    service = http(server, timeout_s=0.5)
    assert service.score(requests("abc")) == ([3.0], "")
    assert (service.cost.requests, service.cost.failed) == (2, 0)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "slow"])
def test_what_keeps_failing_costs_its_own_answers_and_says_why(server: Server, way: str) -> None:
    right, wrong = server.otherwise, WAYS[way][0]
    server.otherwise = lambda to, body: (wrong if body["answers"] == ["bad"] else right)(to, body)
    service = http(server, batch_size=1)
    (good, bad), failure = service.score(requests("good", "bad"))
    assert good == 4.0 and math.isnan(bad)
    assert re.search(WAYS[way][1], failure) and failure.startswith(server.url) and "\n" not in failure
    assert (service.cost.requests, service.cost.failed) == (4, 1)
    server.otherwise = right
    assert service.score(requests("bad"))[0] == [3.0], "a failure is not remembered"


def test_what_will_not_change_is_not_tried_again(server: Server) -> None:
    server.otherwise = lambda to, body: to.send(401, {"error": "no such key"})
    (score,), failure = http(server).score(requests("a"))
    assert math.isnan(score) and "401" in failure and "no such key" in failure and len(server.asked) == 1


def test_nobody_there() -> None:
    service = open_service(HttpReward(type="http", url="http://127.0.0.1:9/score", retries=1, backoff_s=0))
    (score,), failure = service.score(requests("a"))
    assert math.isnan(score) and failure.startswith("http://127.0.0.1:9/score: ") and len(failure) > 30


def test_a_rate_is_kept(server: Server) -> None:
    began = time.monotonic()
    http(server, batch_size=1, per_minute=1200).score(requests(*"abcdef"))
    assert time.monotonic() - began > 5 * 60 / 1200 * 0.9


def test_no_more_than_so_many_at_once(server: Server) -> None:
    right, now, most = server.otherwise, 0, 0

    def counted(to: Handler, body: dict[str, Any]) -> None:
        nonlocal now, most
        with server.lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with server.lock:
            now -= 1
        right(to, body)

    server.otherwise = counted
    http(server, batch_size=1, concurrency=3).score(requests(*"abcdefghij"))
    assert most == 3


def test_a_key_comes_from_the_environment_and_is_asked_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="key_env: JUDGE_KEY is not set"):
        http(server, key_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "abc")
    http(server, key_env="JUDGE_KEY").score(requests("a"))
    assert server.asked[0][2] == "Bearer abc"


def judge(server: Server, **settings: Any) -> Service:
    quick: dict[str, Any] = {
        "type": "judge",
        "url": f"{server.url}/v1/",
        "model": "m",
        "rubric": "Kind answers are good.",
    }
    return open_service(JudgeReward(**{**quick, "retries": 0, **settings}))


def completion(text: str, **tops: float) -> dict[str, Any]:
    content = [{"top_logprobs": [{"token": token, "logprob": math.log(p)} for token, p in tops.items()]}]
    usage = {"prompt_tokens": 70, "completion_tokens": 1}
    return {"choices": [{"message": {"content": text}, "logprobs": {"content": content}}], "usage": usage}


def test_a_judges_score_is_the_mean_of_the_numbers_under_its_probabilities(server: Server) -> None:
    tops = {"5": 0.4, " 5": 0.1, "3": 0.25, "9": 0.1, "The": 0.1, "0": 0.05}
    server.otherwise = lambda to, body: to.send(200, completion("5", **tops))
    service = judge(server)
    (score,), failure = service.score(requests("Honey."))
    assert failure == "" and score == pytest.approx((5 * 0.5 + 3 * 0.25) / 0.75)
    [(path, body, _)] = server.asked
    assert path == "/v1/chat/completions" and body["model"] == "m" and body["logprobs"] is True
    [turn] = body["messages"]
    for part in ("Be kind.", "user: What do bees make?", "[answer]\nHoney.", "from 1", "5, the best"):
        assert part in turn["content"]
    assert (service.cost.prompt_tokens, service.cost.completion_tokens) == (70, 1)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (completion("no", The=0.9), "no number from 1 to 5 is among its 1 likeliest tokens"),
        ({"choices": [{"message": {"content": "4"}, "logprobs": None}]}, "`logprobs: false` takes the number"),
        ({"choices": []}, "no chat completion"),
        ([], "no chat completion"),
    ],
)
def test_a_judge_without_a_number_says_so(server: Server, answer: Any, why: str) -> None:
    server.otherwise = lambda to, body: to.send(200, answer)
    (score,), failure = judge(server).score(requests("Honey."))
    assert math.isnan(score) and why in failure


@pytest.mark.parametrize(("text", "score"), [(" 4.\n", 4.0), ("4 of 5", None), ("7", None), ("", None)])
def test_a_judge_without_log_probs_writes_its_number(server: Server, text: str, score: float | None) -> None:
    server.otherwise = lambda to, body: to.send(200, {"choices": [{"message": {"content": text}}]})
    (found,), failure = judge(server, logprobs=False).score(requests("Honey."))
    assert (found, failure) == (score, "") if score else math.isnan(found) and "in place of a number" in failure
    assert "logprobs" not in server.asked[0][1]
