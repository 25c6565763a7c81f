"""Several endpoints on one Ray: each answers for its own run, and ends alone. Generators of this file answer."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from plumbline.config.serving import Serve
from plumbline.errors import ConfigError
from plumbline.records import Head, UserRequest
from serve.deploy import Place, Served, check_bind, deployed, is_there, start_endpoint, stop_endpoint, wait_for_endpoint
from serve.keys import Keys
from tests.endpoints import free_port

pytestmark = pytest.mark.timeout(300)
HELLO = {"model": "ple", "messages": [{"role": "user", "content": "Hello"}]}


class Speaker:
    """Answers with its name and the version it was asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def answer(self, request: UserRequest) -> AsyncIterator[Head | str]:
        yield Head(status=200, streams=False)
        yield json.dumps({"model": request.ref.public, "by": self._name, "usage": {"completion_tokens": 1}})


class Store:
    """Knows one generator."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    async def generators(self) -> list[Any]:
        return [self._generator]


def make_run(directory: Path, version: int) -> Path:
    proved = directory / "policies" / "ple" / f"v{version:06d}"
    proved.mkdir(parents=True)
    (proved / "proof.json").write_text('{"probe_logps": [-1.0]}')
    (directory / "config.yaml").touch()
    line = {"version": version, "by": "hand"}
    (directory / "policies" / "ple" / "promotions.jsonl").write_text(json.dumps(line) + "\n")
    return directory


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Place]]:
    """Endpoints of two runs, which name a port each, on one Ray Serve, which has one."""
    root, places = tmp_path_factory.mktemp("two"), {}
    for version, name in ((3, "a"), (5, "b c")):
        run_dir = make_run(root / name, version)
        generator = ray.remote(Speaker).options(num_cpus=0).remote(name)
        served = Served(run_dir=run_dir, live=("ple",), store=ray.remote(Store).options(num_cpus=0).remote(generator))
        places[run_dir] = start_endpoint(Serve(port=free_port()), served, Keys(), run_dir)
        asyncio.run(wait_for_endpoint(places[run_dir]))
    yield places


def ask(place: Place) -> tuple[str, str]:
    answer = httpx.post(f"{place.url}/v1/chat/completions", json=HELLO, timeout=30)
    return answer.json()["by"], answer.json()["model"]


def test_each_answers_for_its_own_run_on_one_port(two: dict[Path, Place]) -> None:
    first, second = two.values()
    assert second.url == f"{first.url}/b-c", "the first is where it always is"
    assert (ask(first), ask(second)) == (("a", "ple@3"), ("b c", "ple@5"))
    assert httpx.get(f"{second.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{second.url}/v1/models").json()["data"][1]["root"] == "ple@5"
    assert httpx.get(f"{second.url}/v2").json()["error"]["message"].startswith("Invalid URL (GET ")
    assert {run_dir: deployed(run_dir) for run_dir in two} == two


def test_where_others_reach_ray_serve_an_endpoint_needs_keys(
    two: dict[Path, Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever host its own config names: it is reached where Ray Serve listens."""
    monkeypatch.setattr("serve.deploy.check_bind", lambda host, keys: check_bind("0.0.0.0", keys))
    with pytest.raises(ConfigError, match="needs API keys"):
        start_endpoint(Serve(), Served(run_dir=None), Keys(), Path("c"))
    assert deployed(Path("c")) is None


def test_nobodys_requests_are_logged(two: dict[Path, Place]) -> None:
    for place in two.values():
        ask(place)
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"  # type: ignore[union-attr]
    kept = {path.name: path.read_text("utf-8", errors="replace") for path in logs.iterdir() if path.is_file()}
    assert any(name.startswith("replica") for name in kept)
    assert not [name for name, text in kept.items() if "chat/completions" in text]


def test_requests_are_answered_while_ray_serves_controller_is_started_anew(two: dict[Path, Place]) -> None:
    place = next(iter(two.values()))
    ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve"), no_restart=False)
    for _ in range(50):
        assert ask(place)[0] == "a"


def test_one_ends_alone(two: dict[Path, Place], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "this one")
    (first, place), (second, beside) = two.items()
    stop_endpoint(place)
    assert (deployed(first), deployed(second)) == (None, beside)
    assert (is_there(place), is_there(beside)) == (False, True)
    assert ask(beside) == ("b c", "ple@5")
    assert httpx.get(f"{place.url}/v1/models").status_code == 404
    stop_endpoint(place)  # it has ended already
