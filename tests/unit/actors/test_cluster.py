"""Which Ray is joined, and what is said where it cannot be."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray

from actors import cluster
from actors.cluster import check_address, start_ray
from plumbline.errors import ConfigError, RunError
from tests.endpoints import free_port

told: list[str] = []
"""What servers were told of the token."""
Serve = Callable[[grpc.StatusCode | None], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts what answers a GCS's first question, with a status or with an id; returns its address."""
    servers: list[Any] = []

    def start(status: grpc.StatusCode | None) -> str:
        def answer(request: bytes, context: Any) -> bytes:
            told.append(dict(context.invocation_metadata())["authorization"])
            if status is not None:
                context.abort(status, "InvalidAuthToken: Authentication token is missing or incorrect")
            return b"id"

        handler = grpc.unary_unary_rpc_method_handler(answer)
        server = grpc.server(ThreadPoolExecutor(1))
        service = grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", {"GetClusterId": handler})
        server.add_generic_rpc_handlers((service,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("RAY_AUTH_TOKEN", "b" * 64, "RAY_AUTH_TOKEN;"),
        ("RAY_AUTH_TOKEN_PATH", "/etc/token", "/etc/token (RAY_AUTH_TOKEN_PATH), which cannot be read;"),
        ("HOME", "/home/me", "/home/me/.ray/auth_token, which cannot be read;"),
    ],
)
def test_a_refused_token_is_named(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, named: str
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    address = serve(grpc.StatusCode.UNAUTHENTICATED)
    with pytest.raises(ConfigError) as caught:
        check_address(address)
    assert str(caught.value).startswith(f"RAY_ADDRESS: {address}: refuses the token of {named}")


def test_nobody_there_is_told_before_ray_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was asked"))
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS: {address}: no Ray answers there"):
        start_ray(1)


def test_who_answers_is_joined(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("mine\n")
    check_address(serve(None))
    assert told[-1] == "Bearer mine", "Ray's own reader has none before ray.init"
    check_address(serve(grpc.StatusCode.UNIMPLEMENTED))
    check_address("auto")


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(**options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(RunError, match=r"Ray did not start on this machine: .*timed out during startup"):
        start_ray(1)


def test_two_first_starts_share_one_whole_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where two runs are the first of a user at once: nobody ever sees a file without its token."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".ray" / "auth_token"
    tokens = iter(["a" * 64, "b" * 64])

    def generate() -> str:
        token = next(tokens)
        if token.startswith("a"):  # the other start comes by just now, and is the faster
            assert not file.exists(), "a file that is yet to be filled"
            cluster.make_token()
            assert cluster.read_token()[0] == "b" * 64
        return token

    monkeypatch.setattr(cluster, "generate_new_authentication_token", generate)
    cluster.make_token()
    assert cluster.read_token()[0] == "b" * 64
    assert [one.name for one in file.parent.iterdir()] == ["auth_token"], "nothing is left beside it"
    assert file.stat().st_mode & 0o777 == 0o600
    cluster.make_token()  # who comes later asks for none
