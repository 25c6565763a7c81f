"""A generator: one engine, the policy versions that it serves, and the proof that each of them arrived.

Pipelines send it batches of requests that name a version. A version that it does not hold yet it fetches, loads beside
the others under a new adapter id and proves; so a request ends on the version it began with, nothing is ever paused,
and a generator that was restarted heals itself on the first request.
"""

import asyncio
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from actors.engine import Adapter, Engine, EngineSpec, start_engine
from actors.weights import Proof, prove
from plumbline.records import GenerateRequest, Generation, PolicyRef, Publication, TokenGroup


class Generator:
    """One engine and the versions it serves.

    Args:
        name: what errors and rollouts call this engine.
        choice: which engine.
        spec: how to start it.
        probe: token groups that versions are proved on.
        tolerance: nats (`actors.weights.TOLERANCE`).
        fetch: gets a published version with its files.
        keep: versions of a policy that stay loaded, counted from the newest, beside those that requests still use.
    """

    def __init__(
        self,
        name: str,
        choice: Literal["vllm", "transformers"],
        spec: EngineSpec,
        probe: Sequence[TokenGroup],
        tolerance: float,
        fetch: Callable[[PolicyRef], Awaitable[Publication]],
        keep: int,
    ) -> None:
        self._name = name
        self._choice: Literal["vllm", "transformers"] = choice
        self._spec = spec
        self._probe = list(probe)
        self._tolerance = tolerance
        self._fetch = fetch
        self._keep = keep
        self._engine: Engine | None = None
        self._starting = asyncio.Lock()
        self._ids = itertools.count(1)
        self._directory = Path(tempfile.mkdtemp(prefix="plumbline-adapters-"))
        self._adapters: dict[PolicyRef, Adapter] = {}
        self._loading: dict[PolicyRef, asyncio.Task[Proof]] = {}
        self._measured: dict[PolicyRef, list[float]] = {}
        self._users: dict[PolicyRef, int] = {}
        self._active = 0
        self._busy_since = 0.0
        self._busy_s = 0.0

    async def start(self) -> int:
        """Load the engine, measure the base on the probe. Returns the process id. Calling again returns at once."""
        async with self._starting:
            if self._engine is None:
                engine = start_engine(self._choice, self._spec)
                self._measured[PolicyRef()] = await self._measure(engine, None)
                self._engine = engine
        return os.getpid()

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """Sample all requests together; answers in the order of the requests. Raises SyncError (see `load`)."""
        async with _Busy(self):
            return list(await asyncio.gather(*map(self._one, requests)))

    async def logprobs(self, groups: Sequence[TokenGroup], ref: PolicyRef) -> list[list[list[float]]]:
        """Per-token log-probs of every response of every group under `ref`."""
        async with _Busy(self):
            engine, adapter = await self._acquire(ref)
            try:
                return await asyncio.gather(*(self._score(engine, group, adapter) for group in groups))
            finally:
                self._release(ref)

    async def load(self, ref: PolicyRef) -> Proof:
        """Fetch, load and prove a version. Loading again returns the first proof.

        Raises:
            SyncError: the engine does not answer as that version; it will not be served.
        """
        await self.start()
        if ref not in self._loading:
            self._loading[ref] = asyncio.create_task(self._load(ref))
        try:
            return await asyncio.shield(self._loading[ref])
        except Exception:
            self._loading.pop(ref, None)
            raise

    async def busy_seconds(self) -> float:
        """Seconds, since the start, in which at least one request was being worked on."""
        return self._busy_s + (time.monotonic() - self._busy_since if self._active else 0.0)

    async def close(self) -> None:
        """Stop the engine's processes and remove its files."""
        if self._engine is not None:
            await self._engine.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _one(self, request: GenerateRequest) -> Generation:
        engine, adapter = await self._acquire(request.ref)
        try:
            completions = await engine.generate(
                request.prompt_ids, request.sampling, seed=request.seed, n=request.n, adapter=adapter
            )
        finally:
            self._release(request.ref)
        return Generation(key=request.key, ref=request.ref, engine=self._name, completions=tuple(completions))

    async def _acquire(self, ref: PolicyRef) -> tuple[Engine, Adapter | None]:
        await self.start()
        assert self._engine is not None
        if ref.version == 0:
            return self._engine, None
        self._users[ref] = self._users.get(ref, 0) + 1
        try:
            await self.load(ref)
        except BaseException:
            self._release(ref)
            raise
        return self._engine, self._adapters[ref]

    def _release(self, ref: PolicyRef) -> None:
        if ref in self._users:
            self._users[ref] -= 1
            if self._users[ref] == 0:
                del self._users[ref]

    async def _load(self, ref: PolicyRef) -> Proof:
        publication = await self._fetch(ref)
        assert self._engine is not None
        number = next(self._ids)
        adapter = Adapter(id=number, name=str(ref), path=str(self._write(number, publication.files)))
        await self._engine.add_adapter(adapter)
        measured = await self._measure(self._engine, adapter)
        previous = PolicyRef(policy=ref.policy, version=ref.version - 1)
        reference = previous if previous in self._measured else PolicyRef()
        proof = prove(
            publication,
            engine=self._name,
            measured=measured,
            reference=reference,
            reference_measured=self._measured[reference],
            tolerance=self._tolerance,
        )
        self._measured[ref] = measured
        self._adapters[ref] = adapter
        await self._forget(ref)
        return proof

    async def _forget(self, newest: PolicyRef) -> None:
        """Drop the versions of a policy that are old and that no request uses."""
        assert self._engine is not None
        old = [r for r in self._adapters if r.policy == newest.policy and r.version <= newest.version - self._keep]
        for ref in old:
            if ref in self._adapters and ref not in self._users:  # another load may have dropped it meanwhile
                adapter = self._adapters.pop(ref)
                self._loading.pop(ref, None)
                self._measured.pop(ref, None)
                await self._engine.remove_adapter(adapter)
                shutil.rmtree(adapter.path, ignore_errors=True)

    def _write(self, number: int, files: Mapping[str, bytes]) -> Path:
        directory = self._directory / str(number)  # not by version: the same one may be on its way out
        directory.mkdir()
        for name, content in files.items():
            (directory / name).write_bytes(content)
        return directory

    async def _measure(self, engine: Engine, adapter: Adapter | None) -> list[float]:
        """Mean log-prob a token of every probe response, in order."""
        scored = await asyncio.gather(*(self._score(engine, group, adapter) for group in self._probe))
        return [sum(response) / len(response) for responses in scored for response in responses]

    @staticmethod
    async def _score(engine: Engine, group: TokenGroup, adapter: Adapter | None) -> list[list[float]]:
        return await asyncio.gather(
            *(engine.logprobs(group.prompt_ids, response, adapter=adapter) for response in group.response_ids)
        )


class _Busy:
    """Counts the seconds in which a generator has work."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def __aenter__(self) -> None:
        g = self._generator
        if g._active == 0:
            g._busy_since = time.monotonic()
        g._active += 1

    async def __aexit__(self, *_: object) -> None:
        g = self._generator
        g._active -= 1
        if g._active == 0:
            g._busy_s += time.monotonic() - g._busy_since
