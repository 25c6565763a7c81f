"""The endpoint's application over an engine of this file: names, keys, limits, errors, streams, counts."""

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import ClientDisconnect

from plumbline.config.serving import Limits, Serve
from plumbline.errors import ConfigError
from plumbline.records import Head, PolicyRef, UserRequest
from plumbline.runs.promotions import Catalog, Promotion, promote
from serve import responses
from serve.app import Endpoint, build_app
from serve.errors import ApiError
from serve.keys import Keys, check_bind, read_keys
from serve.requests import FIELDS, IGNORED, NEUTRAL
from tests.unit.conftest import TENSORS

KEY = "sk-a-key-of-our-own"
HELLO = {"model": "ple", "messages": [{"role": "user", "content": "Hello"}]}


class Engine:
    """Answers with the version it was asked for; `fail` and `hold` change that."""

    def __init__(self) -> None:
        self.asked: list[UserRequest] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.begins: Exception | None = None
        self.endless = False
        self.breaks: ApiError | None = None
        self.head = Head(status=200, streams=False)
        self.closed = 0
        self.says: list[str] | None = None

    async def answer(self, request: UserRequest) -> AsyncIterator[Head | str]:
        self.asked.append(request)
        try:
            if self.begins:
                raise self.begins
            await self.hold.wait()
            if self.head.status != 200:
                yield self.head
                yield json.dumps({"error": {"message": "maximum context length is 9 tokens", "param": "messages"}})
            elif self.says:
                yield Head(status=200, streams=request.streams)
                for piece in self.says:
                    yield piece
                if self.breaks:
                    raise self.breaks
            elif request.streams:
                yield Head(status=200, streams=True)
                yield "data: one\n\n"
                while self.endless:
                    await asyncio.sleep(0.001)
                    yield "data: one\n\n"
                if self.breaks:
                    raise self.breaks
                yield "data: [DONE]\n\n"
            else:
                yield self.head
                yield json.dumps({"model": request.ref.public, "usage": {"completion_tokens": 3}})
        finally:
            self.closed += 1

    async def ready(self) -> bool:
        return self.hold.is_set()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").touch()
    for version in (1, 2, 12):
        directory = tmp_path / "policies" / "self_contrast" / f"v{version:06d}"
        directory.mkdir(parents=True)
        (directory / "proof.json").write_text('{"probe_logps": [-1.0]}')
        (tmp_path / "policies" / "ple" / f"v{version:06d}").mkdir(parents=True)
        (tmp_path / "policies" / "ple" / f"v{version:06d}" / "proof.json").write_text('{"probe_logps": [-1.0]}')
        (tmp_path / "policies" / "ple" / f"v{version:06d}" / "model.safetensors").write_bytes(TENSORS)
    (tmp_path / "policies" / "reward" / "v000001").mkdir(parents=True)
    return tmp_path


def keys(tmp_path: Path) -> Keys:
    (tmp_path / "keys").write_text(f"# of the team\n{KEY}\nsk-another-of-our-own\n")
    return read_keys(str(tmp_path / "keys"), {})


Ask = Callable[..., Any]


def talk(run_dir: Path, work: Callable[[httpx.AsyncClient, Engine, Endpoint], Any], **given: Any) -> None:
    """Run `work` with a client of an application of its own."""

    async def main() -> None:
        engine = Engine()
        endpoint = Endpoint(
            Catalog(run_dir, given.get("live")), engine, given.get("keys", Keys()), given.get("limits", Limits())
        )
        transport = httpx.ASGITransport(app=build_app(endpoint), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await work(client, engine, endpoint)

    asyncio.run(main())


def test_several_echoes_with_log_probs_are_not_streamed(run_dir: Path) -> None:
    """vLLM 0.29 ends such a stream with a server error (`benchmarks/mutations.py`, seed 144)."""

    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        asked = {"model": "base", "prompt": "The goat", "n": 2, "logprobs": 1, "echo": True}
        answer = await client.post("/v1/completions", json={**asked, "stream": True})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
        for right in (asked, {**asked, "stream": True, "n": 1}, {**asked, "stream": True, "echo": False}):
            assert (await client.post("/v1/completions", json=right)).status_code == 200

    talk(run_dir, work)


def test_an_alias_means_the_newest_version_until_one_is_promoted(run_dir: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        for name, version in (("ple", "ple@12"), ("self-contrast", "self-contrast@12"), ("self_contrast@2", None)):
            answer = await client.post("/v1/chat/completions", json={**HELLO, "model": name})
            assert answer.headers["x-plumbline-version"] == (version or "self-contrast@2")
        promote(run_dir, Promotion(ref=PolicyRef(policy="ple", version=2), by="hand"))
        answer = await client.post("/v1/chat/completions", json=HELLO)
        assert (answer.json()["model"], engine.asked[-1].ref.version) == ("ple@2", 2)
        assert (await client.post("/v1/chat/completions", json={**HELLO, "model": "base"})).json()["model"] == "base"
        listed = {card["id"]: card["root"] for card in (await client.get("/v1/models")).json()["data"]}
        assert listed == {"base": "base", "ple": "ple@2", "self-contrast": "self-contrast@12"}
        assert (await client.get("/v1/models/ple@1")).json()["root"] == "ple@1"

    talk(run_dir, work)


@pytest.mark.parametrize("live", [None, ["ple", "self_contrast"]])
@pytest.mark.parametrize("lost", ["the directory", "the policies", "the promoted version", "its proof", "the ledger"])
def test_an_alias_whose_version_is_lost_means_nothing(run_dir: Path, live: list[str] | None, lost: str) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        promote(run_dir, Promotion(ref=PolicyRef(policy="ple", version=12), by="hand"))
        assert (await client.post("/v1/chat/completions", json=HELLO)).json()["model"] == "ple@12"
        newest = run_dir / "policies" / "ple" / "v000012"
        if lost == "the directory":
            (run_dir / "config.yaml").unlink()
        elif lost == "the policies":
            shutil.rmtree(run_dir / "policies")
            if live:
                return  # as before anything is published: it means π0
        elif lost == "the promoted version":
            shutil.rmtree(newest)
        elif lost == "its proof":
            (newest / "proof.json").unlink()
        else:
            (run_dir / "policies" / "ple" / "promotions.jsonl").write_text('{"version": "new"}\n')
        answer = await client.post("/v1/chat/completions", json=HELLO)
        assert answer.status_code == 503 and "operator" in answer.json()["error"]["message"]
        listed = {card["id"]: card["root"] for card in (await client.get("/v1/models")).json()["data"]}
        assert listed["ple"] is None and listed["base"] == "base"
        assert (await client.get("/v1/models/ple")).json()["root"] is None
        assert (await client.post("/v1/chat/completions", json={**HELLO, "model": "base"})).status_code == 200
        assert endpoint.admission.requests == 0

    talk(run_dir, work, live=live)


def test_in_a_live_run_an_alias_means_the_base_until_something_is_promoted(run_dir: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        assert (await client.post("/v1/chat/completions", json=HELLO)).headers["x-plumbline-version"] == "base"
        promote(run_dir, Promotion(ref=PolicyRef(policy="ple", version=1), by="gate"))
        assert (await client.post("/v1/chat/completions", json=HELLO)).headers["x-plumbline-version"] == "ple@1"

    talk(run_dir, work, live=["ple"])


@pytest.mark.parametrize(
    "name",
    ["nope", "reward", "ple@3", "ple@", "ple@-1", "ple@1.0", "../ple", "/etc/passwd", "ple/v000001", "ple@١", "base@0",
     "ple@0", "ple@00000000000000001", "policies"],
)  # fmt: skip
def test_names_are_looked_up_and_never_become_paths(run_dir: Path, name: str) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        answer = await client.post("/v1/chat/completions", json={**HELLO, "model": name})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (404, "model_not_found", "invalid_request_error")
        assert engine.asked == []

    talk(run_dir, work)


def test_without_a_right_key_nobody_is_answered_and_no_key_is_shown(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = keys(tmp_path)

    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        for path in ("/v1/models", "/v1/models/ple", "/metrics"):
            assert (await client.get(path)).status_code == 401, path
        for header in ({}, {"Authorization": "Bearer wrong-key"}, {"Authorization": KEY}, {"Authorization": "Bearer "}):
            answer = await client.post("/v1/chat/completions", json=HELLO, headers=header)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "invalid_request_error")
            assert "wrong-key" not in answer.text and KEY not in answer.text
        assert engine.asked == []
        for key in (KEY, "sk-another-of-our-own"):
            header = {"Authorization": f"Bearer {key}"}
            assert (await client.post("/v1/chat/completions", json=HELLO, headers=header)).status_code == 200
        assert (await client.get("/health")).status_code == 200, "health needs no key"
        counted = await client.get("/metrics", headers={"Authorization": f"Bearer {KEY}"})
        assert 'status="401"' in counted.text and KEY not in counted.text
        assert KEY not in repr(endpoint.keys) and KEY not in caplog.text

    talk(run_dir, work, keys=known)


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("chat/completions", b'{"model":', 400, "could not parse the JSON"),
        ("chat/completions", b"[]", 400, "should be an object"),
        ("chat/completions", b"[" * 100_000, 400, "could not parse the JSON"),
        ("chat/completions", {"messages": HELLO["messages"]}, 400, "must provide a model"),
        ("chat/completions", {**HELLO, "model": 3}, 400, "must provide a model"),
        ("chat/completions", {**HELLO, "chat_template": "{{ x }}"}, 400, "Unrecognized request argument"),
        ("chat/completions", {**HELLO, "priority": -9}, 400, "Unrecognized request argument"),
        ("chat/completions", {**HELLO, "n": 9}, 400, "takes 1 to 8"),
        ("chat/completions", {**HELLO, "n": True}, 400, "whole number"),
        ("chat/completions", {**HELLO, "max_tokens": 0}, 400, "takes 1 to"),
        ("chat/completions", {**HELLO, "stream": "yes"}, 400, "true or false"),
        ("chat/completions", {**HELLO, "messages": "Hello"}, 400, "list of turns"),
        ("chat/completions", {**HELLO, "messages": []}, 400, "is empty"),
        ("chat/completions", {**HELLO, "messages": HELLO["messages"] * 257}, 400, "takes 256"),
        ("chat/completions", {**HELLO, "messages": [{"role": "user", "content": "x" * 2**20}]}, 413, "longer than"),
        ("completions", {"model": "ple"}, 400, "`prompt` should be"),
        ("completions", {"model": "ple", "prompt": ["a"] * 257}, 400, "takes 256"),
        ("completions", {"model": "ple", "prompt": "a", "logprobs": 6}, 400, "takes 0 to 5"),
        (
            "chat/completions",
            b'{"model": "ple", "messages": [{"role": "user"}], "temperature": NaN}',
            400,
            "`temperature`",
        ),
        (
            "chat/completions",
            b'{"model": "ple", "messages": [{"role": "user"}], "top_p": 1e999}',
            400,
            "`top_p` is inf",
        ),
        ("completions", b'{"model": "ple", "prompt": "a", "logit_bias": {"5": NaN}}', 400, "`logit_bias.5` is nan"),
        ("completions", {"model": "ple", "prompt": "a", "top_k": 2**63}, 400, "`top_k` is 9223372036854775808; it"),
        ("completions", {"model": "ple", "prompt": "a", "seed": -(10**40)}, 400, "`seed` is -1000"),
        ("completions", {"model": "ple", "prompt": [True]}, 400, "`prompt` should be"),
        ("completions", {"model": "ple", "prompt": [1, "a"]}, 400, "`prompt` should be"),
        ("completions", {"model": "ple", "prompt": [[1], "a"]}, 400, "`prompt` should be"),
        ("completions", {"model": "ple", "prompt": [1.5]}, 400, "`prompt` should be"),
        ("chat/completions", {**HELLO, "tools": [{"type": "function"}]}, 400, "`tools` asks for what is not served"),
        ("chat/completions", {**HELLO, "response_format": {"type": "json_object"}}, 400, "`response_format` asks"),
        ("chat/completions", {**HELLO, "tool_choice": "required"}, 400, "`tool_choice` asks"),
        ("chat/completions", {**HELLO, "modalities": ["text", "audio"]}, 400, "`modalities` asks"),
        (
            "chat/completions",
            {**HELLO, "messages": [{"role": "tool", "content": "a"}]},
            400,
            "`messages.0.role` should be",
        ),
        (
            "chat/completions",
            {**HELLO, "messages": [{"content": "a"}]},
            400,
            "`messages.0.role` should be one of system",
        ),
        ("chat/completions", {**HELLO, "messages": [{"role": ["user"]}]}, 400, "`messages.0.role` should be"),
        ("embeddings", HELLO, 404, "Invalid URL (POST /v1/embeddings)"),
    ],
)
def test_what_is_wrong_with_a_request_is_told_in_openais_form(
    run_dir: Path, path: str, body: Any, status: int, said: str
) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await client.post(f"/v1/{path}", content=content)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert said in answer.json()["error"]["message"]
        assert engine.asked == [] and endpoint.admission.requests == 0

    talk(run_dir, work)


def test_nulls_and_fields_without_a_meaning_here_are_left_out(run_dir: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        body = {**HELLO, "stop": None, "store": True, "metadata": {"a": "b"}, "user": "u", "seed": 3}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        assert dict(engine.asked[0].body) == {"messages": HELLO["messages"], "user": "u", "seed": 3}

    talk(run_dir, work)


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "none"},
        {"tool_choice": "auto"},
        {"functions": [], "function_call": "none"},
        {"modalities": ["text"], "audio": None},
        {"reasoning_effort": "low", "verbosity": "high"},
    ],
)
def test_fields_that_ask_for_no_more_than_text_are_left_out(run_dir: Path, field: dict[str, Any]) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        assert (await client.post("/v1/chat/completions", json={**HELLO, **field})).status_code == 200
        assert dict(engine.asked[0].body) == {"messages": HELLO["messages"]}

    talk(run_dir, work)


def test_a_developers_turn_is_the_systems(run_dir: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        assert (await client.post("/v1/chat/completions", json={**HELLO, "messages": turns})).status_code == 200
        asked: Any = engine.asked[0].body["messages"]
        assert asked[0] == {"role": "system", "content": "Be brief."}

    talk(run_dir, work)


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1, 2], [3]]])
def test_prompts_are_texts_or_token_ids(run_dir: Path, prompt: Any) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        assert (await client.post("/v1/completions", json={"model": "ple", "prompt": prompt})).status_code == 200
        assert engine.asked[0].body["prompt"] == prompt

    talk(run_dir, work)


def test_beyond_its_bound_it_says_when_to_try_again(run_dir: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        engine.hold.clear()
        held = [asyncio.create_task(client.post("/v1/chat/completions", json=HELLO)) for _ in range(2)]
        while endpoint.admission.requests < 2:
            await asyncio.sleep(0.01)
        answer = await client.post("/v1/chat/completions", json=HELLO)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert (await client.get("/health")).status_code == 503
        engine.hold.set()
        assert [(await one).status_code for one in held] == [200, 200]
        assert endpoint.admission.requests == 0

    talk(run_dir, work, limits=Limits(in_flight=2))


def test_a_stream_carries_its_version_and_is_counted(run_dir: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        answer = await client.post("/v1/completions", json={"model": "ple", "prompt": "a", "stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-plumbline-version"] == "ple@12"
        assert answer.text == "data: one\n\ndata: [DONE]\n\n"
        engine.breaks = ApiError(503, "lost")
        answer = await client.post("/v1/completions", json={"model": "ple", "prompt": "a", "stream": True})
        assert answer.status_code == 200 and json.loads(answer.text.splitlines()[2][6:])["error"]["message"] == "lost"
        counted = (await client.get("/metrics")).text
        assert 'plumbline_serve_requests_total{model="ple",status="200",version="12"} 1.0' in counted
        assert 'plumbline_serve_requests_total{model="ple",status="503",version="12"} 1.0' in counted
        assert "plumbline_serve_in_flight 0.0" in counted and (endpoint.admission.requests, engine.closed) == (0, 2)

    talk(run_dir, work)


async def by_hand(endpoint: Endpoint, body: Any, *, begins: bool = True, hangs_up_after: int = 0) -> list[str]:
    """A request as a server passes it on, of a user who hangs up once so many pieces of the body were sent.

    Args:
        begins: else the connection is gone when the answer's head is sent.
    """
    sent: list[str] = []
    gone = asyncio.Event()
    messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> Any:
        if (message := next(messages, None)) is None:
            await gone.wait()
            return {"type": "http.disconnect"}
        return message

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if not begins:
            raise OSError("the connection is gone")
        if sent.count("http.response.body") >= hangs_up_after:
            gone.set()

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    with contextlib.suppress(OSError, ClientDisconnect):
        await asyncio.wait_for(build_app(endpoint)(scope, receive, send), 10)
    return sent


def test_one_caller_leaves_room_for_others(run_dir: Path, tmp_path: Path) -> None:
    """Three quarters of requests, answers and tokens are one's at most; what alone is more is no matter of waiting."""

    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        def ask(key: str, **fields: Any) -> Any:
            body = {"model": "ple", "prompt": "a", "max_tokens": 1, **fields}
            return client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})

        engine.hold.clear()
        for fields, count in ((dict(prompt=["a"] * 4, n=4), 3), (dict(max_tokens=250), 3), ({}, 6)):
            held = [asyncio.create_task(ask(KEY, **fields)) for _ in range(count)]
            while endpoint.admission.requests < count:
                await asyncio.sleep(0.01)
            refused = await ask(KEY, **fields)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            other = asyncio.create_task(ask("sk-another-of-our-own", **fields))
            while endpoint.admission.requests <= count:
                await asyncio.sleep(0.01)
            engine.hold.set()
            assert [(await one).status_code for one in [*held, other]] == [200] * (count + 1)
            assert endpoint.admission.requests == 0
            engine.hold.clear()
        for fields in (dict(prompt=["a"] * 10, n=5), dict(max_tokens=751), dict(n=8, max_tokens=100)):
            assert (await ask(KEY, **fields)).status_code == 400
        assert len({request.caller for request in engine.asked}) == 2 and KEY not in str(engine.asked)

    talk(run_dir, work, keys=keys(tmp_path), limits=Limits(in_flight=8, answers=64, tokens=1000))


@pytest.mark.parametrize("begins", [True, False])
def test_a_user_who_hangs_up_leaves_nothing_behind(run_dir: Path, begins: bool) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        engine.endless = True
        for _ in range(200):
            sent = await by_hand(
                endpoint, {"model": "ple", "prompt": "a", "stream": True}, begins=begins, hangs_up_after=2
            )
            assert sent[0] == "http.response.start" and (len(sent) > 2) == begins
        counted = (await client.get("/metrics")).text
        assert "plumbline_serve_in_flight 0.0" in counted and endpoint.admission.requests == 0
        assert 'status="499",version="12"} 200.0' in counted
        assert engine.closed == 200
        engine.endless, began = False, time.monotonic()
        assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 200
        assert time.monotonic() - began < 1

    talk(run_dir, work)


def test_a_body_that_does_not_come_takes_nobodys_place(run_dir: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        async def half() -> AsyncIterator[bytes]:
            yield b'{"model": '
            await asyncio.sleep(60)

        waiting = [asyncio.create_task(client.post("/v1/completions", content=half())) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 200
        assert [(await one).status_code for one in waiting] == [408] * 3
        assert "plumbline_serve_in_flight 0.0" in (await client.get("/metrics")).text

    talk(run_dir, work, limits=Limits(in_flight=2, body_s=0.3))


def test_a_failure_of_ours_is_counted(run_dir: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        engine.begins = ValueError("a bug")
        assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 500
        counted = (await client.get("/metrics")).text
        assert "plumbline_serve_in_flight 0.0" in counted and 'status="500"' in counted
        assert endpoint.admission.requests == 0

    talk(run_dir, work)


def test_what_an_engine_refuses_is_told_as_openai_would(run_dir: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        engine.head = Head(status=400, streams=False)
        error = (await client.post("/v1/chat/completions", json=HELLO)).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        engine.head = Head(status=500, streams=False)
        answer = await client.post("/v1/chat/completions", json=HELLO)
        assert answer.status_code == 500 and "context" not in answer.text, "an engine's inner failure is not a user's"
        engine.begins = ApiError(503, "no engine", retry_after=5)
        answer = await client.post("/v1/chat/completions", json=HELLO)
        assert (answer.status_code, answer.headers["retry-after"], endpoint.admission.requests) == (503, "5", 0)

    talk(run_dir, work)


def test_the_description_is_of_what_is_taken(run_dir: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        described = (await client.get("/openapi.json")).json()["paths"]["/v1/chat/completions"]["post"]
        schema = described["requestBody"]["content"]["application/json"]["schema"]
        assert schema["required"] == ["model", "messages"] and schema["properties"]["n"]["maximum"] == 8

    talk(run_dir, work)


@pytest.mark.parametrize(
    ("environment", "content", "said"),
    [
        ({}, "", "holds no key"),
        ({}, "short\n", "1 of 1 keys have less"),
        ({}, None, "cannot be read"),
        ({}, "sk-a-key-of-our-öwn\n", "1 of 1 keys cannot be sent in a header"),
        ({}, "sk-a-key of our own\n", "1 of 1 keys cannot be sent in a header"),
        ({}, "sk-a-key\tof-our-own\n", "1 of 1 keys cannot be sent in a header"),
    ],
)
def test_key_files_that_protect_nothing_are_refused(
    tmp_path: Path, environment: Mapping[str, str], content: str | None, said: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_keys(str(path), environment)
    assert "short\n" not in str(caught.value)


def test_others_are_let_in_by_keys_only() -> None:
    assert read_keys(None, {}).digests == ()
    check_bind("127.0.0.1", Keys())
    with pytest.raises(ConfigError, match="needs API keys"):
        check_bind("0.0.0.0", Keys())
    known = read_keys(None, {"PLUMBLINE_API_KEYS": f"{KEY}, sk-another-of-our-own"})
    assert len(known.digests) == 2
    check_bind("0.0.0.0", known)


def test_the_config_has_bounds() -> None:
    assert Serve(replicas=(1, 4)).most_replicas == 4
    with pytest.raises(ValueError, match="should not be the larger"):
        Serve(replicas=(4, 1))


def chunk(**fields: Any) -> str:
    return f"data: {json.dumps({'model': 'ple@12', 'choices': [], **fields})}\n\n"


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
CHAT = {
    "model": "ple@12",
    "choices": [{"message": {"content": "Hello you"}, "finish_reason": "stop"}],
    "usage": USAGE,
}
CHUNKS = [
    chunk(choices=[{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]),
    chunk(choices=[{"delta": {"content": "Hello"}, "finish_reason": None}]),
    chunk(choices=[{"delta": {"content": " you"}, "finish_reason": "length"}]),
    chunk(usage=USAGE),
    "data: [DONE]\n\n",
]


def openai_over(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client, max_retries=0)  # pyright: ignore[reportArgumentType]


def test_a_response_is_a_chat_in_another_form(run_dir: Path) -> None:
    """OpenAI's own client asks and reads it."""

    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        engine.says = [json.dumps(CHAT)]
        talker = openai_over(client)
        answer = await talker.responses.create(
            model="ple", input="Hello", instructions="Be brief.", max_output_tokens=9, temperature=0.5
        )
        assert (answer.output_text, answer.model, answer.status) == ("Hello you", "ple@12", "completed")
        assert answer.usage and (answer.usage.input_tokens, answer.usage.output_tokens) == (3, 2)
        assert dict(engine.asked[0].body) == {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
            "max_completion_tokens": 9,
            "temperature": 0.5,
        }
        turns: Any = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo"}]},
            *[item.model_dump() for item in answer.output],
            {"type": "message", "role": "user", "content": "And?"},
        ]
        await talker.responses.create(model="ple", input=turns, store=False, tools=[], truncation="disabled")
        assert engine.asked[1].body["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello you"},
            {"role": "user", "content": "And?"},
        ]

    talk(run_dir, work)


def test_a_response_is_streamed(run_dir: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        engine.says = CHUNKS
        events = [e async for e in await openai_over(client).responses.create(model="ple", input="Hello", stream=True)]
        assert [event.type for event in events] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        last: Any = events[-1]
        assert (last.response.output_text, last.response.usage.total_tokens) == ("Hello you", 5)
        assert last.response.incomplete_details.reason == "max_output_tokens"
        assert engine.asked[0].body["stream_options"] == {"include_usage": True}
        engine.says = CHUNKS[:2]
        engine.breaks = ApiError(503, "lost")
        answer = await client.post("/v1/responses", json={"model": "ple", "input": "Hello", "stream": True})
        assert answer.text.splitlines()[-3] == "event: error" and '"message": "lost"' in answer.text
        assert endpoint.admission.requests == 0 and engine.closed == 2

    talk(run_dir, work)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({}, "input"),
        ({"input": [3]}, "input.0"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": [3]}]}, "input.0.content"),
        ({"input": [{"role": "king", "content": "a"}]}, "messages.0.role"),
        ({"input": "a", "instructions": ["a"]}, "instructions"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "a", "text": {"format": {"type": "json_object"}}}, "text"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "messages": []}, "messages"),
        ({"input": "a", "max_output_tokens": 0}, "max_completion_tokens"),
        ({"input": "half of a pair: \ud800"}, None),
    ],
)
def test_a_response_of_more_than_text_is_refused(run_dir: Path, fields: dict[str, Any], param: str | None) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        content = json.dumps({"model": "ple", **fields}).encode()
        answer = await client.post("/v1/responses", content=content)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert engine.asked == []

    talk(run_dir, work)


def test_the_description_lists_what_is_taken_and_what_is_left_out(run_dir: Path) -> None:
    async def work(client: httpx.AsyncClient, engine: Engine, endpoint: Endpoint) -> None:
        paths = (await client.get("/openapi.json")).json()["paths"]
        for path, known in (
            ("/v1/chat/completions", FIELDS["chat"] | IGNORED | {*NEUTRAL}),
            ("/v1/completions", (FIELDS["completion"] | IGNORED | {*NEUTRAL}) - {"suffix", "best_of"}),
            ("/v1/responses", (responses.FIELDS | responses.IGNORED | {*responses.NEUTRAL}) - {"stream_options"}),
        ):
            schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            assert set(schema["properties"]) == known, path

    talk(run_dir, work)
