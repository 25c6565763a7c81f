"""A generator: one engine, and the policy versions that it serves (`actors.versions`).

Pipelines send it batches of requests that name a version. A version that it does not hold yet it fetches, loads and
proves; so a request ends on the version it began with.

A generator lives as long as its engine. Where that has a process of its own, which died, this one ends too: Ray starts
both anew, what was asked is asked of another, and nothing is asked of it again before it has proved its versions.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from actors.engines.seam import Adapter, Engine, EngineKind, EngineSpec
from actors.engines.start import start_engine, warm_engine
from actors.gpu import GpuUse, GpuWatch
from actors.metrics import GENERATOR_ACTIVE, GENERATOR_REQUESTS, GENERATOR_TOKENS
from actors.proof import Proof
from actors.versions import AdapterVersions, Fetch, Prober, Versions, WholeVersions, score
from plumbline.records import GenerateRequest, Generation, Head, PolicyRef, TokenGroup, UserRequest

T = TypeVar("T")
LOOK_EVERY_S = 1.0
"""Seconds between two looks at an engine that nobody may be asking."""


class Generator:
    """One engine and the versions it serves.

    Args:
        name: what errors and rollouts call this engine.
        choice: which engine.
        spec: how to start it. Without room for adapters, versions are whole weights.
        probe: token groups that versions are proved on.
        tolerance: nats (`actors.proof.tolerance_of`).
        fetch: gets a published version with its files.
        keep, pinned: see `actors.versions.AdapterVersions`.
    """

    def __init__(
        self,
        name: str,
        choice: EngineKind,
        spec: EngineSpec,
        probe: Sequence[TokenGroup],
        tolerance: float,
        fetch: Fetch,
        keep: int,
        pinned: int = 0,
    ) -> None:
        self._name = name
        self._choice: EngineKind = choice
        self._spec = spec
        self._probe = list(probe)
        self._tolerance = tolerance
        self._fetch = fetch
        self._keep = keep
        self._pinned = pinned
        self._engine: Engine | None = None
        self._watch: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._versions: Versions
        self._active = 0
        self._busy_since = 0.0
        self._busy_s = 0.0
        self._gpu = GpuWatch() if spec.device == "cuda" else None

    async def warm(self) -> None:
        """Do what of `start` needs no model yet; requests are heard meanwhile."""
        await asyncio.to_thread(warm_engine, self._choice, self._spec)

    async def start(self) -> int:
        """Load the engine, measure the base on the probe. Returns the process id. Calling again returns at once."""
        async with self._starting:
            if self._engine is None:
                await self._adopt(engine := start_engine(self._choice, self._spec))
                self._watch = asyncio.create_task(self._end_with(engine))
        return os.getpid()

    async def _adopt(self, engine: Engine) -> None:
        prober = Prober(self._name, engine, self._probe, self._spec.dtype, self._tolerance)
        await prober.measure_base()
        if self._spec.max_adapters:
            self._versions = AdapterVersions(engine, prober, self._fetch, self._keep, self._pinned)
        else:
            self._versions = WholeVersions(engine, prober, self._fetch, self._spec.model_path)
        self._engine = engine

    async def _end_with(self, engine: Engine) -> None:
        """Ray starts this process anew with its engine, where that died while nobody asked it."""
        while True:
            await self._end_if_dead(engine)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _end_if_dead(self, engine: Engine) -> None:
        try:
            await engine.check_health()
        except RuntimeError as error:
            end_process(f"{self._name}: {error}")

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """Sample all requests together; answers in the order of the requests. Raises SyncError (see `load`)."""
        by_ref: dict[PolicyRef, list[int]] = {}
        for i, request in enumerate(requests):
            by_ref.setdefault(request.ref, []).append(i)
        answers: dict[int, Generation] = {}

        async def under(ref: PolicyRef, indices: Sequence[int]) -> None:
            async with self._serving(ref) as (engine, adapter):
                done = await together(self._one(engine, adapter, requests[i]) for i in indices)
                answers.update(zip(indices, done, strict=True))

        async with _Busy(self, len(requests)):
            await together(under(ref, indices) for ref, indices in by_ref.items())
        GENERATOR_REQUESTS.inc(len(requests))
        GENERATOR_TOKENS.inc(sum(len(one.ids) for answer in answers.values() for one in answer.completions))
        return [answers[i] for i in range(len(requests))]

    async def logprobs(self, groups: Sequence[TokenGroup], ref: PolicyRef) -> list[list[list[float]]]:
        """Per-token log-probs of every response of every group under `ref`."""
        async with _Busy(self), self._serving(ref) as (engine, adapter):
            return await together(score(engine, group, adapter) for group in groups)

    async def answer(self, request: UserRequest) -> AsyncIterator[Head | str]:
        """A user's answer, before rollouts: its head, then pieces of its body. Raises SyncError (see `load`)."""
        async with _Busy(self), self._serving(request.ref, pin=True, digest=request.digest) as (engine, adapter):
            async for piece in engine.answer(request, adapter=adapter):
                yield piece

    async def load(self, ref: PolicyRef) -> Proof:
        """Fetch, load and prove a version. Loading again returns the first proof; whole weights may be replaced first.

        Raises:
            SyncError: the engine does not answer as that version; it will not be served.
        """
        await self.start()
        async with self._answering():
            return await self._versions.load(ref)

    async def check_health(self) -> None:
        """Raises RuntimeError where the engine is dead; one that is still loading is not."""
        if self._engine is not None:
            await self._engine.check_health()

    async def busy_seconds(self) -> float:
        """Seconds, since the start, in which at least one request was being worked on."""
        return self._busy_s + (time.monotonic() - self._busy_since if self._active else 0.0)

    async def gpu_use(self) -> GpuUse:
        """What its GPUs did since the start."""
        return GpuUse() if self._gpu is None else self._gpu.use

    async def drained(self) -> None:
        """Wait until nothing is being worked on."""
        while self._active:
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        """Stop the engine's processes and remove its files."""
        if self._engine is not None:
            if self._watch is not None:
                self._watch.cancel()
            await self._engine.close()
            self._versions.close()

    @asynccontextmanager
    async def _serving(
        self, ref: PolicyRef, *, pin: bool = False, digest: str = ""
    ) -> AsyncIterator[tuple[Engine, Adapter | None]]:
        """The engine, which holds `ref` until the end; every request that was begun must have ended by then."""
        await self.start()
        async with self._answering() as engine:
            adapter = await self._versions.acquire(ref, pin=pin, digest=digest)
            try:
                yield engine, adapter
            finally:
                self._versions.release(ref)

    @asynccontextmanager
    async def _answering(self) -> AsyncIterator[Engine]:
        """The engine; where it died over what was asked, nobody hears of that as if the question had been wrong."""
        assert self._engine is not None
        try:
            yield self._engine
        except Exception:
            await self._end_if_dead(self._engine)
            raise

    async def _one(self, engine: Engine, adapter: Adapter | None, request: GenerateRequest) -> Generation:
        completions = await engine.generate(
            request.prompt_ids, request.sampling, seed=request.seed, n=request.n, adapter=adapter
        )
        return Generation(key=request.key, ref=request.ref, engine=self._name, completions=tuple(completions))


def end_process(reason: str) -> None:
    """End this process, so that Ray starts it anew; `reason` stays in its log."""
    logging.getLogger(__name__).critical(reason)
    os._exit(1)


async def together(work: Iterable[Awaitable[T]]) -> list[T]:
    """All results in order; where something failed, the first failure, once all have ended."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


class _Busy:
    """Counts the seconds in which a generator has work, and the requests it works on."""

    def __init__(self, generator: Generator, requests: int = 1) -> None:
        self._generator = generator
        self._requests = requests

    async def __aenter__(self) -> None:
        g = self._generator
        if g._active == 0:
            g._busy_since = time.monotonic()
        g._active += self._requests
        GENERATOR_ACTIVE.set(g._active)

    async def __aexit__(self, *_: object) -> None:
        g = self._generator
        g._active -= self._requests
        GENERATOR_ACTIVE.set(g._active)
        if g._active == 0:
            g._busy_s += time.monotonic() - g._busy_since
