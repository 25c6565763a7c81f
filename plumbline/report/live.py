"""The report over HTTP while a run goes on, on this machine alone. `plumbline watch` calls `open_server`.

There is one page and no other path, so no file of the run's directory is served.
"""

import hashlib
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from plumbline.errors import PlumblineError, UserError
from plumbline.report.files import check_run
from plumbline.report.page import render
from plumbline.report.pages import render_page
from plumbline.report.plots import NEUTRAL
from plumbline.runs.directory import is_running

HOST = "127.0.0.1"
REST = 10
"""After a page was made, ten times as long as that took none is made: watching takes little of what the run needs."""


class LivePage:
    """The page of a run as it stands, made anew where its files have changed."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._making = threading.Lock()
        self._mark, self._page, self._due = "", b"", 0.0

    def get(self) -> tuple[str, bytes]:
        """What tells it from the page before, and the page."""
        with self._making:
            started = time.monotonic()
            if started >= self._due and (mark := self._state()) != self._mark:
                self._page = self._make(mark).encode(errors="replace")
                self._mark = mark
                ended = time.monotonic()
                self._due = ended + REST * (ended - started)
            return self._mark, self._page

    def _make(self, mark: str) -> str:
        try:
            return render(self._run_dir, mark)
        except PlumblineError as error:  # what is told here may be mended while the page is open
            return render_page(
                "page.html.j2",
                kicker="Plumbline report",
                name=self._run_dir.name,
                state="",
                balance="",
                watched=mark,
                notices=[("failed", str(error))],
                color_of=lambda _: NEUTRAL,
            )

    def _state(self) -> str:
        files = [self._run_dir / name for name in ("config.yaml", "events.jsonl", "evaluation.json")]
        seen: list[Any] = [is_running(self._run_dir)]
        for path in (*files, *sorted(self._run_dir.glob("evaluated/*.parquet"))):
            try:
                seen.append((path.name, path.stat().st_mtime_ns, path.stat().st_size))
            except FileNotFoundError:
                continue
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


class Server(ThreadingHTTPServer):
    """Answers GET of the page with the page, and anything else with an error."""

    daemon_threads = True

    def __init__(self, run_dir: Path, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.live = LivePage(run_dir)
        self.url = f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is nobody's fault."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = 30

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            # Another site's name that is made to mean this machine: its scripts may not read the page.
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            mark, page = self.server.live.get()
            same = self.headers.get("If-None-Match") == f'"{mark}"'
            self.send_response(HTTPStatus.NOT_MODIFIED if same else HTTPStatus.OK)
            self.send_header("ETag", f'"{mark}"')
            self.send_header("Cache-Control", "no-cache")
            if not same:
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            if not same:
                self.wfile.write(page)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the user's."""


def open_server(run_dir: Path, port: int) -> Server:
    """A server that is bound, and answers once its `serve_forever` is called; port 0 takes a free one.

    Raises:
        UserError: there is no run, or the port cannot be had.
    """
    check_run(run_dir)
    try:
        return Server(run_dir, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "ports are 0 to 65535"
        raise UserError(f"--port {port}: cannot be listened on ({reason}); name another") from None
