"""The report that is served while a run goes on: what it answers, when it is made anew, and how it ends."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from plumbline.errors import UserError
from plumbline.report import live
from plumbline.report.live import LivePage, Server, open_server
from tests.unit.report.runs import EVENTS, make_run


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Server]:
    """A server over a run that has only begun."""
    with open_server(make_run(tmp_path / "run", events=None), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Server, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str, str]:
    """Status, ETag and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.headers.get("ETag", ""), answer.read().decode()
    connection.close()
    return found


def test_only_the_page_is_there_and_only_for_this_machine(served: Server) -> None:
    status, mark, page = ask(served)
    assert (status, served.server_address[0]) == (200, "127.0.0.1")
    assert "There is no event with a figure to draw yet." in page
    assert f'<body data-watched="{mark.strip(chr(34))}">' in page
    for path in ("/config.yaml", "/events.jsonl", "/../run/config.yaml", "/report.html"):
        assert ask(served, path)[0] == 404
    for method in ("POST", "PUT", "DELETE", "HEAD"):
        assert ask(served, method=method)[0] == 501
    assert ask(served, Host=f"localhost:{served.server_port}")[0] == 200
    assert ask(served, Host="elsewhere.example")[0] == 403
    assert ask(served, **{"If-None-Match": mark})[::2] == (304, "")


def test_a_page_is_made_anew_when_events_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "REST", 0)
    run_dir = make_run(tmp_path / "run", events=None)
    page = LivePage(run_dir)
    first = page.get()
    assert page.get() is not first and page.get() == first
    (run_dir / "events.jsonl").write_text(json.dumps(EVENTS[0]) + "\n")
    mark, second = page.get()
    assert mark != first[0] and b"<figure" in second and b"<figure" not in first[1]


def test_watching_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(tmp_path / "run", events=None)
    clock = iter([0.0, 2.0, 21.9, 22.1, 23.0])  # asked, made after 2 s, asked, asked, made
    monkeypatch.setattr(live.time, "monotonic", lambda: next(clock))
    page = LivePage(run_dir)
    first, _ = page.get()
    (run_dir / "events.jsonl").write_text(json.dumps(EVENTS[0]) + "\n")
    assert page.get()[0] == first
    assert page.get()[0] != first


def test_a_broken_file_is_told_on_the_page_until_it_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "REST", 0)
    run_dir = make_run(tmp_path / "run", evaluation={"rows": [], "samples": []})
    (run_dir / "evaluation.json").write_text("[]")
    page = LivePage(run_dir)
    assert re.search(rb'<li class="failed">[^<]*evaluation.json: <code>rows</code> should be a list', page.get()[1])
    (run_dir / "evaluation.json").unlink()
    assert b"should be a list" not in page.get()[1]


def test_a_port_that_cannot_be_had_is_one_line(served: Server, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"^--port {served.server_port}: cannot be listened on \(Address already in use\)"
    ):
        open_server(tmp_path / "run", served.server_port)
    with pytest.raises(UserError, match=r"^--port 65536: cannot be listened on \(ports are 0 to 65535\)"):
        open_server(tmp_path / "run", 65536)
    with pytest.raises(UserError, match="no such directory"):
        open_server(tmp_path / "gone", 0)


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", events=None)
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "watch", str(run_dir), "--port", "0"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    found = re.fullmatch(rf"{re.escape(str(run_dir))} on http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends\)\n", said)
    assert found, said
    with socket.create_connection(("127.0.0.1", int(found[1]))) as hung_up:
        hung_up.sendall(b"GET / HTTP/1.0\r\n")
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip(), err) == (0, "", "")
