"""A stand-in for the Hugging Face hub: the calls that huggingface_hub makes to read a model and to push one, over HTTP
on localhost. What uses it runs in a process of its own: huggingface_hub reads its environment when it is imported.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Repo:
    """A model: its files by commit, and what its branches and tags are."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit on a branch, of these files alone."""
        content = [str(len(self.commits)), *(f"{name}{hashlib.sha1(data).hexdigest()}" for name, data in files.items())]
        sha = hashlib.sha1("".join(content).encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        return sha


@dataclass
class Hub:
    """What is on it, and what was asked of it: `METHOD /path`, one a request."""

    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: dict[str, bool] = field(default_factory=dict)  # whether it may write
    url: str = ""

    def add(self, name: str, directory: Path, **more: bytes) -> str:
        """A commit with a directory's files and `more`; returns it."""
        files = {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        return self.repos.setdefault(name, Repo()).commit(files | more)

    def downloads(self) -> list[str]:
        """Names of the files whose content was sent, each in its repository."""
        return sorted(line.rpartition("/")[2] for line in self.asked if line.startswith("GET ") and "/resolve/" in line)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file(content=False)

    def do_GET(self) -> None:
        path = self._path()
        if "/resolve/" in path:
            self._file(content=True)
            return
        _, _, _, org, model, *rest = path.split("/")
        repo, kind, revision = self.hub.repos.get(f"{org}/{model}"), rest[0] if rest else "", "/".join(rest[1:])
        if repo is None:
            self._refuse(401, "RepoNotFound")
            return
        sha = repo.refs.get(revision or "main", revision)
        if sha not in repo.commits:
            self._refuse(404, "RevisionNotFound")
        elif kind == "tree":
            files = repo.commits[sha].items()
            self._json([{"type": "file", "path": p, "size": len(d), "oid": _oid(d)} for p, d in files])
        else:
            siblings = [{"rfilename": path} for path in repo.commits[sha]]
            self._json({"id": f"{org}/{model}", "sha": sha, "private": repo.private, "siblings": siblings})

    def do_POST(self) -> None:
        path, body = self._path(), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path == "/api/validate-yaml":
            wrong = [line for line in json.loads(body)["content"].splitlines() if line.startswith("base_model: /")]
            self._json({"errors": [{"message": f"no model: {line}"} for line in wrong]}, 400 if wrong else 200)
        elif not self.hub.tokens.get(token):
            said = "Your token may not write here." if token in self.hub.tokens else "Invalid credentials"
            self._json({"error": said}, 403 if token in self.hub.tokens else 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in self.hub.repos
            if not there:
                self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
                self.hub.repos[name].commit({})
            self._json({"url": f"{self.hub.url}/{name}"}, 409 if there else 200)
        else:
            _, _, _, org, model, what, _ = path.split("/")
            if what == "preupload":
                files = json.loads(body)["files"]
                self._json({"files": [{**one, "uploadMode": "regular", "shouldIgnore": False} for one in files]})
            else:
                lines = [json.loads(line) for line in body.splitlines()]
                files = {
                    v["path"]: base64.b64decode(v["content"]) for v in (x["value"] for x in lines if x["key"] == "file")
                }
                repo = self.hub.repos[f"{org}/{model}"]
                sha = repo.commit(repo.commits[repo.refs["main"]] | files)
                self._json(
                    {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{org}/{model}/commit/{sha}"}
                )

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        return path

    def _file(self, content: bool) -> None:
        _, org, model, _, revision, *parts = self._path().split("/") if not content else self._asked()
        repo = self.hub.repos[f"{org}/{model}"]
        if repo.gated:
            self._refuse(403, "GatedRepo")
            return
        data = repo.commits[revision]["/".join(parts)]
        self.send_response(200)
        self.send_header("X-Repo-Commit", revision)
        self.send_header("ETag", f'"{_oid(data)}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if content:
            self.wfile.write(data)

    def _asked(self) -> list[str]:
        return unquote(urlsplit(self.path).path).split("/")

    def _json(self, tree: Any, status: int = 200) -> None:
        body = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _oid(data: bytes) -> str:
    """As git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub without any model, until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def fill_cache(home: Path, name: str, directory: Path, commit: str, branch: str = "main") -> Path:
    """A model in the cache under HF_HOME, as transformers leaves it there; returns its directory."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    snapshot.mkdir(parents=True)
    for file in (file for file in directory.iterdir() if file.is_file()):
        blob = folder / "blobs" / _oid(file.read_bytes())
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (folder / "refs" / branch).write_text(commit)
    return snapshot


def python(code: str, *arguments: object, home: Path, url: str, cwd: Path, **variables: str) -> str:
    """What a Python program prints, with its errors' last line, run over such a hub and a cache of its own."""
    given = {
        "HF_HOME": str(home),
        "HF_ENDPOINT": url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={**kept, **given, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + "".join(done.stderr.splitlines(keepends=True)[-1:])
