"""`plumbline chat` against a small OpenAI-shaped server over HTTP: in this process, through pipes, in a terminal."""

import asyncio
import codecs
import fcntl
import io
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from cli.main import main

MODELS = ("base", "ple", "dlma")
KEY = "sk-a-secret-of-somebody"
PATIENCE = 60.0  # seconds; other processes may be crowding this machine
DISTRACTIONS = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES")  # of the terminal that runs the tests
TALK = [sys.executable, "-m", "cli", "chat"]


class Server:
    """What the server saw, and what it is to do. A message of one of the words below gets what it names."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.key: str | None = None
        self.go_on = threading.Event()  # what `wait` waits for in the middle of its answer
        self.left = threading.Event()  # set when a client left in the middle of an answer
        self.under_way: set[str] = set()

    def reset(self) -> None:
        """As at the start."""
        url = self.url
        self.__init__()
        self.url = url

    async def words(self, model: str, text: str) -> AsyncIterator[str]:
        """The pieces of an answer."""
        if text == "wait":
            yield "The beginning"
            try:
                while not self.go_on.is_set():
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.left.set()
                raise
            yield " and the end."
        elif text == "together":  # ends only when every model was asked
            self.under_way.add(model)
            yield f"{model} "
            while len(self.under_way) < 2:
                await asyncio.sleep(0.01)
            yield "met."
        elif text == "escape":
            yield "\x1b[31mred\x1b[0m\x07 \ud83d \x9b2Jend\r\n\tindented [bold]no markup[/] :smile:"
        elif text == "many":
            yield "".join(f"line {number} of {model}\n" for number in range(200))
        elif text == "nothing":
            pass
        else:
            for word in f"{model} heard: {text}".split(" "):
                yield word if word == model else f" {word}"

    async def events(self, model: str, text: str) -> AsyncIterator[str]:
        """An answer as server-sent events."""

        def event(delta: dict[str, str], ended: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": ended}
            head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": model}
            return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

        yield event({"role": "assistant", "content": ""})
        async for word in self.words(model, text):
            yield event({"content": word})
        if text == "fail":
            error = {"message": f"the engine died; key {KEY}", "type": "server_error"}
            yield f"data: {json.dumps({'error': error})}\n\n"
            return
        if text == "cut":
            return
        if text == "break":
            raise ConnectionResetError
        if text == "garbage":
            yield "data: {no json\n\n"
            return
        yield event({}, {"long": "length", "filtered": "content_filter"}.get(text, "stop"))
        yield f"data: {json.dumps({'id': 'c', 'object': 'chat.completion.chunk', 'choices': [], 'usage': {}})}\n\n"
        yield "data: [DONE]\n\n"

    def refusal(self, request: Request, text: str = "", model: str = MODELS[0]) -> Response | None:
        """An error in OpenAI's form, where there is one."""
        status, message, headers = 0, "", {}
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            status, message = 401, f"Incorrect API key provided: {request.headers.get('authorization')}"
        elif text == "busy":
            status, message, headers = 429, "too many requests", {"retry-after": "7"}
        elif text == "crash":
            status, message = 500, "an inner\nerror with " + KEY
        elif text == "refuse":
            status, message = 400, "maximum context length is 64 tokens"
        elif model.partition("@")[0] not in MODELS:
            status, message = 404, f"The model `{model}` does not exist."
        body = {"error": {"message": message, "type": "an_error", "param": None, "code": status}}
        return JSONResponse(body, status, headers) if status else None

    def app(self) -> FastAPI:
        """The HTTP face."""
        app = FastAPI()

        @app.get("/v1/models")
        def models(request: Request) -> Response:
            listed = [{"id": name, "object": "model", "created": 1, "owned_by": "us"} for name in MODELS]
            return self.refusal(request) or JSONResponse({"object": "list", "data": listed})

        @app.post("/v1/chat/completions")
        async def completions(request: Request) -> Response:
            body = await request.json()
            self.asked.append(body)
            self.headers.append(dict(request.headers))
            model, text = body["model"], body["messages"][-1]["content"].strip()
            headers = {"x-plumbline-version": "ple@12"} if model.startswith("ple") else {}
            return self.refusal(request, text, model) or StreamingResponse(
                self.events(model, text), media_type="text/event-stream", headers=headers
            )

        @app.get("/page/models")
        @app.post("/page/chat/completions")
        def page() -> Response:
            return HTMLResponse("<html>Welcome</html>")

        return app


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    """The server, on a port of its own; it closes idle connections after a second."""
    server = Server()
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(server.app(), log_level="critical", timeout_keep_alive=1, timeout_graceful_shutdown=1)
    http = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(http.serve([listening])), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    eventually(lambda: http.started)
    yield server
    http.should_exit = True
    thread.join(PATIENCE)


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """As new, and the only thing that the environment names."""
    running.reset()
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy") or name in DISTRACTIONS:
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_BASE_URL", running.url)
    monkeypatch.setenv("TERM", "xterm-256color")
    return running


def eventually(holds: Callable[[], object]) -> None:
    """Waits until `holds`."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def converse(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> int:
    """The exit code of a conversation whose input is `lines`."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", *arguments])


def said(messages: list[dict[str, str]]) -> list[str]:
    """A request's messages, short."""
    return [f"{message['role']}: {message['content']}" for message in messages]


# Asked once


def test_one_model_asked_once_prints_its_text_alone(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "ple", "--system", "Be brief.", "--temperature", "0.5", "--max-tokens", "9"]
    assert main(["chat", "--ask", "Why so?", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == "ple heard: Why so?\n"
    assert captured.err == ""
    [asked] = server.asked
    assert said(asked.pop("messages")) == ["system: Be brief.", "user: Why so?"]
    assert asked == {"model": "ple", "stream": True, "temperature": 0.5, "max_tokens": 9}
    assert server.headers[0]["authorization"] == "Bearer none"


def test_the_first_model_answers_where_none_is_named(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--ask", "Why?"]) == 0
    assert capsys.readouterr().out == "base heard: Why?\n"
    assert set(server.asked[0]) == {"model", "messages", "stream"}


def test_url_goes_before_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert main(["chat", "--ask", "Why?", "--url", server.url]) == 0
    assert capsys.readouterr().out == "base heard: Why?\n"


def test_several_models_are_asked_at_once_and_answer_in_order(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of the two ends only when the other was asked as well."""
    assert main(["chat", "--ask", "together", "--model", "ple", "--model", "base"]) == 0
    assert capsys.readouterr().out == "ple · ple@12\nple met.\n\nbase\nbase met.\n\n"


def test_a_pinned_version_is_named_once(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--ask", "Why?", "--model", "ple@12", "--model", "ple"]) == 0
    assert capsys.readouterr().out.splitlines()[::3] == ["ple@12", "ple · ple@12"]


def test_one_of_several_fails_alone(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--model", "nobody", "--model", "base", "--model", "none"]
    assert main(["chat", "--ask", "Why?", *names]) == 2
    captured = capsys.readouterr()
    assert captured.out == "base\nbase heard: Why?\n\n"
    assert captured.err.splitlines() == [
        f"plumbline: {server.url}: the server has no model {name}; it has base, ple, dlma"
        for name in ("nobody", "none")
    ]


def test_text_arrives_while_the_answer_is_still_being_made(server: Server) -> None:
    process = subprocess.Popen([*TALK, "--ask", "wait"], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.read(13) == "The beginning"
    assert not server.go_on.is_set()
    server.go_on.set()
    assert process.stdout.read() == " and the end.\n"
    assert process.wait(PATIENCE) == 0


def test_nothing_of_a_text_commands_the_terminal(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--ask", "escape"]) == 0
    assert capsys.readouterr().out == "[31mred[0m  2Jend\n\tindented [bold]no markup[/] :smile:\n"


def test_a_reader_that_has_enough_ends_it_without_a_word(server: Server) -> None:
    process = subprocess.Popen([*TALK, "--ask", "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    assert process.stdout.read(3) == "The"
    process.stdout.close()
    server.go_on.set()
    assert process.wait(PATIENCE) == 141
    assert process.stderr.read() == ""


# A conversation


def test_a_conversation_has_a_memory(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "one\n\n/system Be kind.\ntwo\n/clear\n /three\n/system\nfour"
    assert converse(monkeypatch, lines, "--model", "ple") == 0
    assert [said(asked["messages"]) for asked in server.asked] == [
        ["user: one"],
        ["system: Be kind.", "user: one", "assistant: ple heard: one", "user: two"],
        ["system: Be kind.", "user:  /three"],
        ["user:  /three", "assistant: ple heard: /three", "user: four"],
    ]
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines()[:3] == ["ple · ple@12", "ple heard: one", ""]


def test_models_are_listed_and_switched_within_a_conversation(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converse(monkeypatch, "one\n/model ple\ntwo\n/models\n/quit\nthree\n") == 0
    assert [(asked["model"], said(asked["messages"])) for asked in server.asked] == [
        ("base", ["user: one"]),
        ("ple", ["user: one", "assistant: base heard: one", "user: two"]),
    ]
    shown = capsys.readouterr().out.splitlines()
    assert shown[shown.index("now: ple") + 1 :] == [
        "ple · ple@12",
        "ple heard: two",
        "",
        "  base",
        "* ple",
        "  dlma",
    ]


def test_side_by_side_each_has_a_history_of_its_own(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One joins with what was said before; from then on each sees its own answers, and one can go on alone."""
    lines = "one\n/beside ple\ntwo\nthree\n/beside base\nfour\n/beside ple\n"
    assert converse(monkeypatch, lines, "--model", "base") == 0
    history: dict[str, list[str]] = {}
    for asked in server.asked:
        history[asked["model"]] = said(asked["messages"])
    first = ["user: one", "assistant: base heard: one"]
    assert history["base"] == [*first, "user: two", "assistant: base heard: two", "user: three"]
    assert history["ple"] == [
        *[*first, "user: two", "assistant: ple heard: two", "user: three", "assistant: ple heard: three"],
        "user: four",
    ]
    captured = capsys.readouterr()
    assert [line for line in captured.out.splitlines() if line.startswith("now:")] == ["now: base | ple", "now: ple"]
    assert captured.err.splitlines() == [
        "plumbline: /beside ple: nobody else answers; name another model, or go on with one by /model"
    ]


def test_errors_are_told_and_the_conversation_goes_on(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What got no answer at all is not in the history; what got half an answer is."""
    lines = "busy\nbreak\n/nonsense\n/model\n/model nobody\none\n/model base\nlast\n"
    assert converse(monkeypatch, lines) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        f"plumbline: {server.url}: the server takes no more requests now (429), try again in 7 s: too many requests",
        f"plumbline: {server.url}: the connection broke off in the middle of the answer",
        "plumbline: /nonsense: no such command; /help lists them, and a message may begin with a blank",
        "plumbline: /model: name a model, such as /model ple; /models lists them",
        f"plumbline: {server.url}: the server has no model nobody; it has base, ple, dlma",
    ]
    assert said(server.asked[-1]["messages"]) == ["user: break", "assistant: base heard: break", "user: last"]


def test_help_names_every_command(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converse(monkeypatch, "/help\n") == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^/\w+", shown, re.MULTILINE) == [
        *["/models", "/model", "/beside", "/system", "/clear", "/quit"],
    ]
    assert server.asked == []


def test_a_connection_that_the_server_closed_meanwhile_is_opened_again(server: Server) -> None:
    """Somebody thinks for longer than the server keeps an idle connection."""
    process = subprocess.Popen(
        TALK, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write("one\n")
    assert [process.stdout.readline() for _ in range(3)] == ["base\n", "base heard: one\n", "\n"]
    time.sleep(2.5)
    process.stdin.write("two\n")
    process.stdin.close()
    assert process.stdout.read() == "base\nbase heard: two\n\n"
    assert process.stderr.read() == ""
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("long", "ended at the most tokens allowed"),
        ("filtered", "ended by content_filter"),
        ("nothing", "an empty answer"),
    ],
)
def test_an_answer_that_is_not_whole_says_so(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, note: str
) -> None:
    assert converse(monkeypatch, text) == 0
    assert f"[{note}]" in capsys.readouterr().out.splitlines()


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--model", "nobody"], 2, "URL: the server has no model nobody; it has base, ple, dlma"),
        (["--ask", "refuse"], 2, "URL: the server refuses the request (400): maximum context length is 64 tokens"),
        (["--ask", "busy"], 1, "URL: the server takes no more requests now (429), try again in 7 s: too many requests"),
        (["--ask", "crash"], 1, f"URL: the server failed (500): an inner error with {KEY}"),
        (["--ask", "fail"], 1, f"URL: the engine died; key {KEY}"),
        (["--ask", "cut"], 1, "URL: the stream ended before the answer did"),
        (["--ask", "break"], 1, "URL: the connection broke off in the middle of the answer"),
        (["--ask", " "], 2, "--ask: there is no text to ask"),
        (["--ask", "\udcff"], 2, "the text holds bytes that are no UTF-8"),
        (["--temperature", "-1"], 2, "--temperature -1: it should be 0 or more"),
        (["--temperature", "nan"], 2, "--temperature nan: it should be 0 or more"),
        (["--max-tokens", "0"], 2, "--max-tokens 0: it should be 1 or more"),
        (["--model", "a", "--model", "a"], 2, "--model a: it is named twice; name each model once"),
        (["--url", "127.0.0.1:8000"], 2, "--url: it should be an http:// or https:// address, such as"),
        (["--url", "http://a\x01b/v1"], 2, "--url: it should be an http:// or https:// address, such as"),
        (["--url", "http://127.0.0.1:port/v1"], 2, "--url: Port could not be cast to integer value as 'port'; it"),
        (["--url", "http://127.0.0.1:1/v1"], 2, "http://127.0.0.1:1/v1: no server answers there ("),
        (["--url", "http://u:p@127.0.0.1:1/v1?q=s"], 2, "http://127.0.0.1:1/v1: no server answers there ("),
        (["--url", "ELSEWHERE/page"], 2, "ELSEWHERE/page: no list of models comes from there; the address of"),
        (["--url", "ELSEWHERE/page", "--model", "a"], 1, "ELSEWHERE/page: the stream ended before the answer did"),
        (["--url", "ELSEWHERE", "--model", "a"], 2, "ELSEWHERE: no OpenAI API is there (404); its address usually"),
        (["--ask", "garbage"], 1, "URL: what comes from there is no JSON, as OpenAI's API would have it"),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_every_error_is_one_line_with_its_code(
    server: Server, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, line: str
) -> None:
    elsewhere = server.url.removesuffix("/v1")
    arguments = [argument.replace("ELSEWHERE", elsewhere) for argument in arguments]
    assert main(["chat", *(() if "--ask" in arguments else ("--ask", "Why?")), *arguments]) == code
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith(f"plumbline: {line.replace('URL', server.url).replace('ELSEWHERE', elsewhere)}")


def test_what_came_before_an_error_is_shown(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--ask", "break"]) == 1
    assert capsys.readouterr().out == "base heard: break\n"


def test_a_conversation_outlives_a_server_that_is_away(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converse(monkeypatch, "one\ntwo\n", "--url", "http://127.0.0.1:1/v1") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split("(")[0] for line in captured.err.splitlines()] == [
        "plumbline: http://127.0.0.1:1/v1: no server answers there "
    ] * 2


# Keys


def test_the_key_comes_from_a_file_before_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.key = KEY
    keys = tmp_path / "keys"
    keys.write_text(f"# of the team\n\n {KEY} \nsk-another\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    assert main(["chat", "--ask", "Why?", "--key-file", str(keys)]) == 0
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert main(["chat", "--ask", "Why?"]) == 0


def test_a_wrong_key_is_refused_and_never_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.key = "sk-right"
    assert main(["chat", "--ask", "Why?"]) == 2
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert main(["chat", "--ask", "Why?"]) == 2
    assert main(["chat", "--ask", "Why?", "--model", "ple"]) == 2
    captured = capsys.readouterr()
    refused = f"plumbline: {server.url}: the server refuses the key from OPENAI_API_KEY"
    assert captured.err.splitlines() == [
        f"plumbline: {server.url}: the server asks for a key; give it by --key-file or OPENAI_API_KEY",
        *[refused, refused],
    ]
    assert KEY not in captured.out


@pytest.mark.parametrize("text", ["crash", "fail"])
def test_a_server_that_repeats_the_key_does_not_make_us_show_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert main(["chat", "--ask", text]) == 1
    captured = capsys.readouterr()
    assert KEY not in captured.out + captured.err
    assert "***" in captured.err


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "it cannot be read: No such file or directory"),
        (b"\n# none yet\n", "there is no key in it"),
        (b"\xff\xfe\x00", "it should be a text file that holds a key"),
        (b"sk secret\n", "a key should be visible ASCII characters without blanks"),
        ("sk-sécret\n".encode(), "a key should be visible ASCII characters without blanks"),
    ],
)
def test_a_key_file_without_a_key_is_wrong_use(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, line: str
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    assert main(["chat", "--ask", "Why?", "--key-file", str(path)]) == 2
    assert capsys.readouterr().err == f"plumbline: --key-file {path}: {line}\n"
    assert server.asked == []


# Ctrl-C


def test_ctrl_c_stops_an_answer_and_what_came_stays_in_the_history(server: Server) -> None:
    process = subprocess.Popen(TALK, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write("wait\n")
    process.stdin.flush()
    assert process.stdout.readline() == "base\n"
    assert process.stdout.read(13) == "The beginning"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "\n"
    assert process.stdout.readline() == "[stopped]\n"
    assert server.left.wait(PATIENCE)  # it need not go on for nobody
    process.stdin.write("next\n")
    process.stdin.close()
    assert process.wait(PATIENCE) == 0
    assert process.stderr.read() == ""
    assert said(server.asked[-1]["messages"]) == ["user: wait", "assistant: The beginning", "user: next"]


def test_ctrl_c_ends_a_single_question(server: Server) -> None:
    process = subprocess.Popen([*TALK, "--ask", "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    assert process.stdout.read(13) == "The beginning"
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    assert (process.stdout.read(), process.stderr.read()) == ("\n", "")


# In a terminal


class Terminal:
    """`plumbline chat` in a terminal of its own."""

    def __init__(self, width: int, *arguments: str) -> None:
        self._mine, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        self._process = subprocess.Popen(
            [*TALK, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=dict(os.environ),  # as it stands here; readline puts COLUMNS where only other processes see it
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self._output, self._seen = "", 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with suppress(OSError):  # Linux's way to say that the other side has closed it
            while True:
                self._output += decoder.decode(os.read(self._mine, 65536))

    @property
    def shown(self) -> str:
        """What came after the text that was last waited for."""
        return self._output[self._seen :]

    def type(self, text: str) -> None:
        """As if by hand."""
        os.write(self._mine, text.encode())

    def shows(self, text: str) -> None:
        """Waits for `text`."""
        eventually(lambda: text in self.shown)
        self._seen = self._output.index(text, self._seen) + len(text)

    def ends(self) -> int:
        """Its exit code."""
        return self._process.wait(PATIENCE)

    def plain(self) -> list[str]:
        """The lines shown since, without escape codes."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.shown).replace("\r", "").split("\n")


def test_two_models_stand_side_by_side_in_a_terminal(server: Server) -> None:
    terminal = Terminal(100, "--model", "base", "--model", "ple")
    terminal.shows("base | ple> ")
    terminal.type("many\n")
    terminal.shows("base | ple> ")
    terminal.type("one\n")
    terminal.shows("one")
    eventually(lambda: "base | ple> " in terminal.shown)
    assert "\x1b[2m · ple@12\x1b[0m" in terminal.shown  # dim
    rows = [[cell.strip() for cell in re.split("[│┼]", line)] for line in terminal.plain()]
    assert ["base", "ple · ple@12"] in rows
    assert ["base heard: one", "ple heard: one"] in rows
    terminal.type("wait\n")
    terminal.shows("The beginning")
    terminal.type("\x03")
    terminal.shows("base | ple> ")
    terminal.type("two\n")
    eventually(lambda: len(server.asked) == 8)
    assert [said(asked["messages"])[-3:] for asked in server.asked[-2:]] == [
        ["user: wait", "assistant: The beginning", "user: two"]
    ] * 2
    terminal.shows("base | ple> ")
    terminal.type("\x04")
    assert terminal.ends() == 0


def test_long_answers_side_by_side_leave_all_their_lines(server: Server) -> None:
    terminal = Terminal(100, "--model", "base", "--model", "ple", "--ask", "many")
    assert terminal.ends() == 0
    eventually(lambda: "line 199 of ple" in terminal.shown)
    rows = [[cell.strip() for cell in line.split("│")] for line in terminal.plain()]
    final = rows[-201:]
    assert [row for row in final if len(row) == 2] == [
        [f"line {number} of base", f"line {number} of ple"] for number in range(200)
    ]


def test_in_a_narrow_terminal_answers_stand_below_one_another(server: Server) -> None:
    terminal = Terminal(50, "--model", "base", "--model", "ple", "--ask", "one")
    assert terminal.ends() == 0
    eventually(lambda: "ple heard: one" in terminal.shown)
    shown = [line for line in terminal.plain() if line]
    assert shown == ["base", "base heard: one", "ple · ple@12", "ple heard: one"]


def test_keys_in_a_terminal(server: Server) -> None:
    """Lines can be edited, Ctrl-C stops one answer, or nothing at the prompt, and Ctrl-D ends it."""
    terminal = Terminal(100)
    terminal.shows(f"{server.url} · /help lists the commands, Ctrl-D ends")
    terminal.shows("base> ")
    terminal.type("waiter\x7f\x7f\n")
    terminal.shows("The beginning")
    terminal.type("\x03")
    terminal.shows("[stopped]")
    terminal.shows("base> ")
    terminal.type("not sent\x03")
    terminal.shows("Ctrl-D or /quit ends")
    terminal.shows("base> ")
    terminal.type("\x1b[A\x1b[D\x1b[Cer\n")  # the line before, by the arrow key
    terminal.shows("base heard: waiter")
    terminal.shows("base> ")
    terminal.type("\x04")
    assert terminal.ends() == 0
    assert [said(asked["messages"])[-1] for asked in server.asked] == ["user: wait", "user: waiter"]


# The command line


def test_the_help_of_chat_needs_no_client(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys\nfrom cli.main import main\n"
        "try:\n    main(['chat', '--help'])\nexcept SystemExit:\n    print({'openai', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
