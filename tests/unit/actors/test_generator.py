"""A generator over an engine that only pretends: which versions it loads, proves, serves and forgets."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import generator as module
from actors import versions
from actors.engines.seam import Adapter, EngineSpec
from actors.generator import Generator
from actors.versions import AdapterVersions
from plumbline.errors import SyncError
from plumbline.records import (
    Completion,
    GenerateRequest,
    Head,
    PolicyRef,
    Publication,
    Sampling,
    SharedWeights,
    TokenGroup,
    UserRequest,
)
from plumbline.runs.policies import version_digest
from tests.tiny import engine_spec

SPEC = engine_spec("model", max_model_len=64)
PROBE = [TokenGroup([1, 2], [[3, 4]]), TokenGroup([1], [[5], [6, 7, 8]])]
BASE_LOGP = -2.0  # of every token under the base; version v adds v / 10


class FakeEngine:
    """Weights are files that hold a number, which is added to every log-prob. Sampling waits until it is allowed."""

    kind = "fake"

    def __init__(self) -> None:
        self.loaded: dict[int, float] = {}
        self.whole = 0.0
        self.replaced: list[str] = []
        self.deaf = False
        self.leaks = False
        self.added: list[Adapter] = []
        self.removed: list[Adapter] = []
        self.allowed = asyncio.Event()
        self.allowed.set()
        self.slow_removal = 0
        self.closed = False
        self.dead = False

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, n: int, adapter: Adapter | None
    ) -> list[Completion]:
        await self.allowed.wait()
        shift = self.loaded[adapter.id] if adapter else self.whole
        return [Completion(text=f"{shift:.1f}/{seed + i}", ids=[9], finish_reason="stop") for i in range(n)]

    async def logprobs(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], *, adapter: Adapter | None
    ) -> list[float]:
        await asyncio.sleep(0)
        beside = max(self.loaded.values(), default=0.0) if self.leaks else self.whole
        return [BASE_LOGP + (self.loaded[adapter.id] if adapter else beside)] * len(response_ids)

    async def add_adapter(self, adapter: Adapter) -> None:
        await asyncio.sleep(0)
        self.added.append(adapter)
        self.loaded[adapter.id] = float((Path(adapter.path) / "shift").read_text())

    async def remove_adapter(self, adapter: Adapter) -> None:
        for _ in range(self.slow_removal):
            await asyncio.sleep(0)
        self.removed.append(adapter)
        del self.loaded[adapter.id]

    async def load_weights(self, path: str, shared: SharedWeights | None = None) -> bool:
        await asyncio.sleep(0)
        self.replaced.append(shared.card if shared else path)
        if shared:
            self.whole = float(shared.handle)
        elif not self.deaf:
            self.whole = 0.0 if path == SPEC.model_path else float((Path(path) / "shift").read_text())
        return shared is not None

    async def answer(self, request: UserRequest, *, adapter: Adapter | None) -> AsyncIterator[Head | str]:
        yield Head(status=200, streams=False)
        await self.allowed.wait()
        yield f"{self.loaded[adapter.id] if adapter else self.whole:.1f}"

    async def check_health(self) -> None:
        if self.dead:
            raise RuntimeError("dead")

    async def close(self) -> None:
        self.closed = True


class Bench:
    """A generator, its engine, and the store that it fetches from; `arrives` is what a version's files really hold."""

    def __init__(self, keep: int = 2, whole: bool = False) -> None:
        self.engine = FakeEngine()
        self.starts = 0
        self.fetched: list[PolicyRef] = []
        self.arrives: Callable[[int], object] = lambda version: version / 10 + self.offset
        self.offset = 0.0  # of every version, published and arrived
        spec = replace(SPEC, max_adapters=0) if whole else SPEC
        self.generator = Generator("generator-0", "transformers", spec, PROBE, 1e-3, self.fetch, keep)

    async def fetch(self, ref: PolicyRef, digest: str = "") -> Publication:
        self.fetched.append(ref)
        await asyncio.sleep(0)

        def probe(version: int) -> list[float]:
            return [BASE_LOGP + version / 10 + (self.offset if version else 0)] * 3

        return Publication(
            ref=ref,
            files={"shift": str(self.arrives(ref.version)).encode()},
            probe_logps=probe(ref.version),
            previous_probe_logps=probe(ref.version - 1),
            base_probe_logps=probe(0),
        )

    def start(self, choice: str, spec: EngineSpec) -> FakeEngine:
        self.starts += 1
        return self.engine


def ple(version: int) -> PolicyRef:
    return PolicyRef(policy="ple", version=version)


def request(version: int, key: str = "a", seed: int = 5, n: int = 1) -> GenerateRequest:
    return GenerateRequest(
        key=key, prompt_ids=[1, 2], ref=ple(version), sampling=Sampling(max_tokens=4), seed=seed, n=n
    )


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a scenario on a bench of its own and closes the generator."""

    def run(scenario: Callable[[Bench], Coroutine[Any, Any, None]], keep: int = 2, whole: bool = False) -> None:
        async def played() -> None:
            bench = Bench(keep, whole)
            monkeypatch.setattr(module, "start_engine", bench.start)
            try:
                await scenario(bench)
            finally:
                await bench.generator.close()

        asyncio.run(played())

    return run


Play = Callable[..., None]


def adapters_of(bench: Bench) -> dict[PolicyRef, Adapter]:
    assert isinstance(bench.generator._versions, AdapterVersions)
    return bench.generator._versions.adapters


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def test_it_starts_once_however_often_it_is_asked(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        assert await asyncio.gather(*(bench.generator.start() for _ in range(4))) == [os.getpid()] * 4
        await bench.generator.generate([request(0)])
        assert bench.starts == 1

    play(scenario)


class EndedError(BaseException):
    """In place of the end of this process."""


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reasons for which the process would have ended."""
    reasons: list[str] = []

    def end(reason: str) -> None:
        reasons.append(reason)
        raise EndedError

    monkeypatch.setattr(module, "end_process", end)
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)
    return reasons


def test_it_ends_with_its_engine_though_nobody_asks(play: Play, ended: list[str]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.generator.start()
        await asyncio.sleep(0.05)
        assert ended == []
        bench.engine.dead = True
        await asyncio.sleep(0.05)
        assert ended == ["generator-0: dead"]

    play(scenario)


@pytest.mark.parametrize("question", ["generate", "load"])
def test_nobody_hears_of_a_dead_engine_as_of_a_wrong_question(play: Play, ended: list[str], question: str) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.generator.start()

        async def fails(*_: object, **__: object) -> None:
            bench.engine.dead = True
            raise RuntimeError("EngineCore encountered an issue")

        bench.engine.generate = bench.engine.add_adapter = fails  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(EndedError):
            await (bench.generator.load(ple(1)) if question == "load" else bench.generator.generate([request(0)]))
        assert ended == ["generator-0: dead"]
        bench.engine.dead = False

    play(scenario)


def test_a_wrong_question_ends_nothing(play: Play, ended: list[str]) -> None:
    async def scenario(bench: Bench) -> None:
        bench.arrives = lambda version: 5.0
        with pytest.raises(SyncError):
            await bench.generator.load(ple(1))
        assert ended == []

    play(scenario)


def test_the_base_needs_no_version(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        [generation] = await bench.generator.generate([request(0)])
        assert (generation.engine, generation.ref, generation.completions[0].text) == ("generator-0", ple(0), "0.0/5")
        assert bench.fetched == []

    play(scenario)


def test_answers_come_in_the_order_of_the_requests_each_from_its_own_version(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        asked = [request(2, "x"), request(0, "y", seed=7, n=2), request(1, "z")]
        answers = await bench.generator.generate(asked)
        assert [(a.key, a.ref.version, [c.text for c in a.completions]) for a in answers] == [
            ("x", 2, ["0.2/5"]),
            ("y", 0, ["0.0/7", "0.0/8"]),
            ("z", 1, ["0.1/5"]),
        ]

    play(scenario)


def test_a_version_is_loaded_once_though_many_ask_at_once(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        proofs = await asyncio.gather(
            bench.generator.load(ple(1)), bench.generator.load(ple(1)), bench.generator.generate([request(1)] * 3)
        )
        assert proofs[0] == proofs[1]
        assert proofs[0].engine == "generator-0"
        assert await bench.generator.load(ple(1)) == proofs[0]
        assert bench.fetched == [ple(1)]
        assert [adapter.name for adapter in bench.engine.added] == ["ple@1"]

    play(scenario)


def test_a_version_is_measured_against_the_one_before(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        for version in (1, 2, 3):
            proof = await bench.generator.load(ple(version))
            assert proof.drift == pytest.approx(1.0)
            assert proof.difference == pytest.approx(0.0, abs=1e-9)

    play(scenario)


def test_old_versions_are_forgotten(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        for version in (1, 2, 3, 4):
            await bench.generator.load(ple(version))
        assert [adapter.name for adapter in bench.engine.removed] == ["ple@1", "ple@2"]
        assert not any(Path(adapter.path).exists() for adapter in bench.engine.removed)
        assert sorted(bench.engine.loaded.values()) == [0.3, 0.4]

    play(scenario)


def test_another_policys_versions_are_left_alone(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.generator.load(PolicyRef(policy="dlma", version=1))
        for version in (1, 2, 3, 4):
            await bench.generator.load(ple(version))
        assert "dlma@1" not in [adapter.name for adapter in bench.engine.removed]

    play(scenario)


def test_a_forgotten_version_comes_back_under_a_new_id(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        for version in (1, 2, 3):
            await bench.generator.load(ple(version))
        [generation] = await bench.generator.generate([request(1)])
        assert generation.completions[0].text == "0.1/5"
        first, *_, last = bench.engine.added
        assert (first.name, last.name) == ("ple@1", "ple@1")
        assert len({adapter.id for adapter in bench.engine.added}) == 4
        assert len({adapter.path for adapter in bench.engine.added}) == 4

    play(scenario)


def test_a_request_under_way_keeps_its_version(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.generator.load(ple(1))
        bench.engine.allowed.clear()
        slow = asyncio.create_task(bench.generator.generate([request(1)]))
        await settle()
        for version in (2, 3, 4, 5):
            await bench.generator.load(ple(version))
        assert [adapter.name for adapter in bench.engine.removed] == ["ple@2", "ple@3"]
        bench.engine.allowed.set()
        [generation] = await slow
        assert (generation.ref.version, generation.completions[0].text) == (1, "0.1/5")
        await bench.generator.load(ple(6))
        assert [adapter.name for adapter in bench.engine.removed] == ["ple@2", "ple@3", "ple@1", "ple@4"]

    play(scenario)


def test_two_loads_that_end_together_forget_a_version_once(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        for version in (1, 2):
            await bench.generator.load(ple(version))
        bench.engine.slow_removal = 5
        await asyncio.gather(*(bench.generator.load(ple(version)) for version in (5, 6)))
        assert sorted(adapter.name for adapter in bench.engine.removed) == ["ple@1", "ple@2"]

    play(scenario)


def test_a_version_asked_for_while_it_is_being_forgotten(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        for version in (1, 2):
            await bench.generator.load(ple(version))
        bench.engine.slow_removal = 20
        newest = asyncio.create_task(bench.generator.load(ple(3)))
        while ple(1) in adapters_of(bench):
            await asyncio.sleep(0)
        [generation] = await bench.generator.generate([request(1)])
        await newest
        assert generation.completions[0].text == "0.1/5"
        assert Path(bench.engine.added[-1].path).is_dir(), "the files of the new one are not those that went"

    play(scenario)


def test_what_was_not_proved_is_never_served(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.generator.load(ple(1))
        bench.arrives = lambda version: 0.1  # whatever is asked for, version 1 arrives
        with pytest.raises(SyncError, match=r"ple v000002 did not arrive at engine generator-0: it still answers as"):
            await bench.generator.load(ple(2))
        with pytest.raises(SyncError):
            await bench.generator.generate([request(2)])
        with pytest.raises(SyncError):
            await bench.generator.logprobs(PROBE, ple(2))
        [generation] = await bench.generator.generate([request(1)])
        assert generation.completions[0].text == "0.1/5"

    play(scenario)


def test_an_adapter_that_changes_the_base_is_never_served(play: Play) -> None:
    """As vLLM's CPU backend once had it: beside adapters, the base was answered by one of them."""

    async def scenario(bench: Bench) -> None:
        await bench.generator.load(ple(1))
        bench.engine.leaks = True
        with pytest.raises(SyncError, match=r"ple v000002 .* generator-0: beside it, the base answers otherwise"):
            await bench.generator.load(ple(2))

    play(scenario)


async def told(bench: Bench, version: int, digest: str = "") -> str:
    """What a user is answered by a version."""
    asked = UserRequest(kind="chat", body={}, ref=ple(version), digest=digest)
    return [str(piece) async for piece in bench.generator.answer(asked)][1]


async def digest_of(bench: Bench, version: int) -> str:
    there = await bench.fetch(ple(version))
    bench.fetched.pop()
    return version_digest(there.digests, there.probe_logps)


@pytest.mark.parametrize("whole", [False, True])
def test_weights_that_were_made_anew_under_a_name_are_loaded_anew(play: Play, whole: bool) -> None:
    """What a user is answered by is known by its digest; who asked before ends on what he began with."""

    async def scenario(bench: Bench) -> None:
        first = await digest_of(bench, 1)
        assert [await told(bench, 1, first) for _ in range(2)] == ["0.1", "0.1"]
        assert bench.fetched == [ple(1)]
        bench.engine.allowed.clear()
        slow = asyncio.create_task(told(bench, 1, first))
        await settle()
        bench.offset = 0.4
        second = await digest_of(bench, 1)
        assert second != first
        asked = asyncio.create_task(told(bench, 1, second))
        await settle()
        bench.engine.allowed.set()
        assert (await slow, await asked) == ("0.1", "0.5")
        assert bench.fetched == [ple(1), ple(1)]
        assert await told(bench, 1, second) == "0.5" and len(bench.fetched) == 2
        if not whole:
            await bench.generator.load(ple(2))
            assert len(bench.engine.removed) == 1 and len(list(directory_of(bench).iterdir())) == 2

    play(scenario, whole=whole)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("wrong", ["unreadable", "another"])
def test_a_version_that_does_not_load_is_tried_once_and_leaves_nothing(
    play: Play, monkeypatch: pytest.MonkeyPatch, whole: bool, wrong: str
) -> None:
    """Users are told again and again; after a while it is tried anew."""

    async def scenario(bench: Bench) -> None:
        digest = await digest_of(bench, 1)
        bench.arrives = lambda version: "cut off" if wrong == "unreadable" else 0.7
        for _ in range(5):
            with pytest.raises(SyncError, match="cannot read it" if wrong == "unreadable" else "moved"):
                await told(bench, 1, digest)
        assert bench.fetched == [ple(1)]
        assert bench.engine.loaded == {}
        assert whole or list(directory_of(bench).iterdir()) == []
        assert await told(bench, 0) == "0.0"
        bench.arrives = lambda version: version / 10
        monkeypatch.setattr(versions, "REMEMBERED_S", 0.0)
        assert await told(bench, 1, digest) == "0.1"

    play(scenario, whole=whole)


def test_an_engine_that_died_is_no_fault_of_a_version(play: Play, ended: list[str]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.generator.check_health()
        await bench.generator.start()
        bench.engine.dead = True
        with pytest.raises(RuntimeError, match="dead"):
            await bench.generator.check_health()
        bench.arrives = lambda version: "cut off"
        with pytest.raises(EndedError):
            await told(bench, 1)
        bench.engine.dead, bench.arrives = False, lambda version: version / 10
        assert await told(bench, 1) == "0.1"

    play(scenario)


def directory_of(bench: Bench) -> Path:
    assert isinstance(bench.generator._versions, AdapterVersions)
    return bench.generator._versions._directory


def test_a_failed_load_is_tried_anew(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        bench.arrives = lambda version: 0.0
        failures = await asyncio.gather(
            bench.generator.load(ple(1)), bench.generator.generate([request(1)]), return_exceptions=True
        )
        assert [type(failure) for failure in failures] == [SyncError, SyncError]
        bench.arrives = lambda version: version / 10
        assert (await bench.generator.load(ple(1))).drift == pytest.approx(1.0)

    play(scenario)


def test_one_waiter_that_gives_up_does_not_end_the_load(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.generator.start()
        impatient = asyncio.create_task(bench.generator.load(ple(1)))
        await asyncio.sleep(0)
        patient = asyncio.create_task(bench.generator.load(ple(1)))
        await asyncio.sleep(0)
        impatient.cancel()
        assert (await patient).ref == ple(1)
        assert bench.fetched == [ple(1)]

    play(scenario)


def test_log_probs_are_a_version_s_own_token_by_token(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        scored = await bench.generator.logprobs(PROBE, ple(2))
        assert [[len(response) for response in group] for group in scored] == [[2], [1, 3]]
        assert scored[0][0] == pytest.approx([-1.8, -1.8])
        assert (await bench.generator.logprobs(PROBE[:1], PolicyRef()))[0][0] == pytest.approx([-2.0, -2.0])

    play(scenario)


def test_busy_seconds_count_overlapping_requests_once(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))

    async def scenario(bench: Bench) -> None:
        nonlocal now
        await bench.generator.start()
        assert await bench.generator.busy_seconds() == 0.0
        bench.engine.allowed.clear()
        asked = [asyncio.create_task(bench.generator.generate([request(0)])) for _ in range(2)]
        await asyncio.sleep(0)
        now += 3
        assert await bench.generator.busy_seconds() == 3.0, "also while it works"
        bench.engine.allowed.set()
        await asyncio.gather(*asked)
        now += 50
        assert await bench.generator.busy_seconds() == 3.0, "idle time does not count"

    play(scenario)


def test_a_failed_request_leaves_it_idle(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        bench.arrives = lambda version: 0.0
        with pytest.raises(SyncError):
            await bench.generator.generate([request(1)])
        before = await bench.generator.busy_seconds()
        await asyncio.sleep(0.01)
        assert await bench.generator.busy_seconds() == before

    play(scenario)


def test_closing_stops_the_engine_and_removes_its_files(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.generator.load(ple(1))
        path = Path(bench.engine.added[0].path)
        assert path.is_dir()
        await bench.generator.close()
        assert bench.engine.closed
        assert not path.parent.exists()

    play(scenario)


# Whole weights: one version at a time


def texts(answers: Sequence[Any]) -> list[str]:
    return [answer.completions[0].text for answer in answers]


def test_whole_weights_replace_each_other_and_each_is_proved(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        for version in (1, 2, 3):
            proof = await bench.generator.load(ple(version))
            assert (proof.ref, proof.drift) == (ple(version), pytest.approx(1.0))
            assert bench.engine.whole == version / 10
            assert await bench.generator.load(ple(version)) == proof
        assert texts(await bench.generator.generate([request(3)] * 2)) == ["0.3/5", "0.3/5"]
        assert len(bench.engine.replaced) == 3
        assert not any(Path(path).parent.exists() for path in bench.engine.replaced), "files go once they are loaded"

    play(scenario, whole=True)


def test_whole_weights_wait_until_the_requests_under_way_have_ended(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.generator.load(ple(1))
        bench.engine.allowed.clear()
        under_way = asyncio.create_task(bench.generator.generate([request(1, n=1)]))
        await settle()
        newer = asyncio.create_task(bench.generator.load(ple(2)))
        await settle()
        late = asyncio.create_task(bench.generator.generate([request(1)]))  # of the old one, but after the newer
        await settle()
        assert bench.engine.whole == 0.1
        bench.engine.allowed.set()
        assert texts(await under_way) == ["0.1/5"]
        assert (await newer).ref == ple(2)
        assert texts(await late) == ["0.1/5"], "it is loaded again"
        assert bench.fetched == [ple(1), ple(2), ple(1)]

    play(scenario, whole=True)


def test_a_batch_of_several_whole_versions_mixes_none(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        asked = [request(version, str(i)) for i, version in enumerate((2, 0, 1, 2))]
        answers = await bench.generator.generate(asked)
        assert [answer.key for answer in answers] == ["0", "1", "2", "3"]
        assert texts(answers) == ["0.2/5", "0.0/5", "0.1/5", "0.2/5"]
        assert len(bench.engine.replaced) == 3

    play(scenario, whole=True)


def test_the_base_of_whole_weights_is_read_from_its_directory_and_proved(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        assert texts(await bench.generator.generate([request(0)])) == ["0.0/5"]
        assert bench.engine.replaced == [], "it is there already"
        await bench.generator.load(ple(1))
        assert texts(await bench.generator.generate([request(0)])) == ["0.0/5"]
        assert bench.engine.replaced[1] == SPEC.model_path
        await bench.generator.load(ple(1))
        bench.engine.deaf = True
        with pytest.raises(SyncError, match=r"base v000000 did not arrive at engine generator-0: it still answers as"):
            await bench.generator.generate([request(0)])

    play(scenario, whole=True)


def test_whole_weights_that_were_not_proved_are_never_served(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.generator.load(ple(1))
        bench.engine.deaf = True
        with pytest.raises(SyncError, match=r"ple v000002 did not arrive at engine generator-0: it still answers as"):
            await bench.generator.load(ple(2))
        with pytest.raises(SyncError):
            await bench.generator.generate([request(2)])
        bench.engine.deaf = False
        assert texts(await bench.generator.generate([request(1)])) == ["0.1/5"]
        assert len(bench.engine.replaced) == 4, "version 1 is loaded anew: what was there was not proved"

    play(scenario, whole=True)


def test_whole_weights_are_read_where_they_lie(play: Play, tmp_path: Path) -> None:
    """A directory that the engine sees is neither copied nor removed."""

    async def scenario(bench: Bench) -> None:
        sent = await bench.fetch(ple(1))
        for name, content in sent.files.items():
            (tmp_path / name).write_bytes(content)

        async def fetch(ref: PolicyRef, digest: str) -> Publication:
            return replace(sent, files={}, directory=str(tmp_path))

        bench.generator._fetch = fetch
        await bench.generator.load(ple(1))
        assert texts(await bench.generator.generate([request(1)])) == ["0.1/5"]
        assert bench.engine.replaced == [str(tmp_path)]
        assert (tmp_path / "shift").is_file()

    play(scenario, whole=True)


@pytest.mark.parametrize(("holds", "read"), [(b"0.1", ["card"]), (b"0.2", ["card", "files"])])
def test_a_card_that_holds_the_next_version_already_is_noticed(
    play: Play, tmp_path: Path, holds: bytes, read: list[str]
) -> None:
    async def scenario(bench: Bench) -> None:
        sent = await bench.fetch(ple(1))
        (tmp_path / "shift").write_bytes(sent.files["shift"])

        async def fetch(ref: PolicyRef, digest: str) -> Publication:
            shared = SharedWeights(card="card", handle=holds, shapes={})
            return replace(sent, files={}, directory=str(tmp_path), shared=shared)

        bench.generator._fetch = fetch
        await bench.generator.load(ple(1))
        assert texts(await bench.generator.generate([request(1)])) == ["0.1/5"]
        assert bench.engine.replaced == [{"card": "card", "files": str(tmp_path)}[one] for one in read]

    play(scenario, whole=True)


def test_whole_weights_are_not_replaced_twice_at_once_where_a_waiter_gives_up(play: Play) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.generator.start()
        impatient = asyncio.create_task(bench.generator.load(ple(1)))
        for _ in range(4):
            await asyncio.sleep(0)
        impatient.cancel()
        assert texts(await bench.generator.generate([request(1)])) == ["0.1/5"]
        assert bench.fetched == [ple(1)]

    play(scenario, whole=True)


def test_a_generator_may_be_started_before_its_model_is_made(tiny_model: Path, tmp_path: Path) -> None:
    async def later() -> int:
        spec = engine_spec(tmp_path / "later", max_adapters=0)
        generator = Generator("generator-0", "transformers", spec, PROBE, 1e-3, Bench().fetch, keep=1)
        await generator.warm()
        await generator.close()  # as an interrupted run does
        shutil.copytree(tiny_model, tmp_path / "later")
        return await generator.start()

    assert asyncio.run(later()) == os.getpid()
