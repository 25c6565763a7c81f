"""Which versions of policies an engine holds, and the proof that each of them arrived. Used by `actors.generator`.

Adapters lie side by side (`AdapterVersions`); of whole weights an engine holds one version at a time (`WholeVersions`).
Both fetch a version when it is first asked for, so that a generator that was restarted heals itself.
"""

import asyncio
import itertools
import math
import shutil
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from actors.engines.seam import Adapter, Engine
from actors.metrics import PROBE_DIFFERENCE, PROOF_SECONDS
from actors.proof import Digests, Proof, prove
from plumbline.errors import SyncError, in_one_line
from plumbline.records import PolicyRef, Publication, TokenGroup
from plumbline.runs.policies import version_digest

Fetch = Callable[[PolicyRef, str], Awaitable[Publication]]
"""Gets a published version by its digest, "" for whatever there is by its name."""
REMEMBERED_S = 60.0
"""For how long a version that could not be loaded is not tried again for users."""


class Versions(Protocol):
    """The versions that one engine holds."""

    async def load(self, ref: PolicyRef) -> Proof:
        """Fetch, load and prove a version. Raises SyncError."""
        ...

    async def acquire(self, ref: PolicyRef, *, pin: bool = False, digest: str = "") -> Adapter | None:
        """Wait until requests may be answered by `ref`, which stays until `release`; returns what names it.

        Args:
            pin: a user asks: the version stays loaded after it, until as many others were asked for as are pinned.
            digest: what it is known by; what is loaded under its name with another digest is replaced.

        Raises:
            SyncError: it does not load, or not as itself.
        """
        ...

    def release(self, ref: PolicyRef) -> None: ...

    def close(self) -> None:
        """Remove files."""
        ...


class Failures:
    """Versions that could not be loaded for users: for a while they are told so at once, and nothing is tried again."""

    def __init__(self) -> None:
        self._kept: dict[tuple[PolicyRef, str], tuple[float, SyncError]] = {}

    def check(self, ref: PolicyRef, digest: str) -> None:
        """Raises the SyncError with which it failed, not long ago."""
        since, error = self._kept.get((ref, digest), (-math.inf, None))
        if error is not None and time.monotonic() - since < REMEMBERED_S:
            raise error.with_traceback(None)

    def note(self, ref: PolicyRef, digest: str, error: SyncError) -> None:
        """It has failed so."""
        self._kept[ref, digest] = time.monotonic(), error


class Prober:
    """Measures one engine on the probe, and proves versions against what it measured of version 0.

    Args:
        name: what errors call the engine.
        dtype: that the engine computes in, which says in what form its tensors are.
        tolerance: nats (`actors.proof.tolerance_of`).
    """

    def __init__(self, name: str, engine: Engine, probe: Sequence[TokenGroup], dtype: str, tolerance: float) -> None:
        self.name, self._engine, self._probe = name, engine, list(probe)
        self.dtype, self._tolerance = dtype, tolerance
        self.base_measured: list[float] = []
        self.measured: list[float] = []  # under the version that was proved last
        self._base_held: Sequence[Digests] = ()

    async def measure_base(self) -> None:
        """To be called once, while the engine holds version 0."""
        self.base_measured = self.measured = await self.measure(None)

    async def measure(self, adapter: Adapter | None) -> list[float]:
        """Mean log-prob a token of every probe response, in order."""
        scored = await asyncio.gather(*(score(self._engine, group, adapter) for group in self._probe))
        return [sum(response) / len(response) for responses in scored for response in responses]

    async def prove(self, publication: Publication, adapter: Adapter | None) -> Proof:
        """See `actors.proof.prove`. Raises SyncError, also where the base is not what it was."""
        started = time.monotonic()
        # The adapter and the base in one go, as requests are: the base must be left alone.
        measured, beside = await asyncio.gather(self.measure(adapter), self.measure(None) if adapter else _nothing())
        expected = publication.digests.get(self.dtype, {})
        proof = prove(
            publication,
            engine=self.name,
            measured=measured,
            base_measured=self.base_measured,
            beside=beside,
            tolerance=self._tolerance,
            expected=expected,
            held=await self._engine.digests(list(expected), adapter=adapter) if expected else (),
        )
        self.measured = measured
        PROOF_SECONDS.observe(time.monotonic() - started, policy=publication.ref.policy)
        PROBE_DIFFERENCE.set(proof.difference, policy=publication.ref.policy)
        return proof

    async def leave_base(self, names: Sequence[str]) -> None:
        """Note what the engine holds of version 0's tensors, before they are replaced for the first time."""
        if names and not self._base_held:
            self._base_held = await self._engine.digests(names, adapter=None)

    async def prove_base(self, left: PolicyRef) -> Proof:
        """Prove that the engine is back at version 0, from the version `left`: it holds and shows what it did first."""
        expected = {name: held for name, held in (self._base_held[0] if self._base_held else {}).items() if held}
        return prove(
            Publication(
                ref=PolicyRef(),
                files={},
                probe_logps=self.base_measured,
                previous_probe_logps=self.measured,
                base_probe_logps=self.measured,
            ),
            engine=self.name,
            measured=await self.measure(None),
            base_measured=self.measured,
            origin=left,
            tolerance=self._tolerance,
            expected=expected,
            held=await self._engine.digests(list(expected), adapter=None) if expected else (),
        )


async def _nothing() -> None:
    pass


class AdapterVersions:
    """Adapters beside the base: a request ends on the version it began with, and nothing is ever paused.

    Args:
        keep: versions of a policy that stay loaded, counted from the newest, beside those that requests still use.
        pinned: versions that stay loaded since users asked for them last.
    """

    def __init__(self, engine: Engine, prober: Prober, fetch: Fetch, keep: int, pinned: int = 0) -> None:
        self._engine, self._prober, self._fetch, self._keep = engine, prober, fetch, keep
        self._pins: deque[PolicyRef] = deque(maxlen=pinned)
        self._directory = Path(tempfile.mkdtemp(prefix="plumbline-adapters-"))
        self._loading: dict[PolicyRef, asyncio.Task[Proof]] = {}
        self._users: dict[PolicyRef, int] = {}
        self._digests: dict[PolicyRef, str] = {}
        self._replaced: dict[PolicyRef, list[Adapter]] = {}  # under the same name, and perhaps still in use
        self._failures = Failures()
        self.ids = itertools.count(1)
        self.adapters: dict[PolicyRef, Adapter] = {}

    async def load(self, ref: PolicyRef, digest: str = "") -> Proof:
        if digest and self._digests.get(ref, digest) != digest:
            self._set_aside(ref)
        if ref not in self._loading:
            self._loading[ref] = asyncio.create_task(self._load(ref, digest))
        loading = self._loading[ref]
        try:
            return await asyncio.shield(loading)
        except Exception as error:
            if self._loading.get(ref) is loading:
                del self._loading[ref]
            if isinstance(error, SyncError):
                self._failures.note(ref, digest, error)
            raise

    async def acquire(self, ref: PolicyRef, *, pin: bool = False, digest: str = "") -> Adapter | None:
        if ref.version == 0:
            return None
        if pin:
            self._failures.check(ref, digest)
            if ref in self._pins:
                self._pins.remove(ref)
            self._pins.append(ref)
        self._users[ref] = self._users.get(ref, 0) + 1
        try:
            await self.load(ref, digest)
        except BaseException:
            self.release(ref)
            raise
        return self.adapters[ref]

    def release(self, ref: PolicyRef) -> None:
        if ref in self._users:
            self._users[ref] -= 1
            if self._users[ref] == 0:
                del self._users[ref]

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _load(self, ref: PolicyRef, digest: str) -> Proof:
        publication = await self._fetch(ref, digest)
        number = next(self.ids)
        directory = self._directory / str(number)  # not by version: the same one may be on its way out
        adapter = Adapter(id=number, name=ref.public, path=str(directory))
        added = False
        try:
            write_files(directory, publication.files)
            await self._add(ref, adapter)
            added = True
            proof = await self._prober.prove(publication, adapter)
        except BaseException:
            await self._drop(adapter, loaded=added)
            raise
        self.adapters[ref] = adapter
        self._digests[ref] = version_digest(publication.digests, publication.probe_logps)
        await self.forget(ref)
        return proof

    async def _add(self, ref: PolicyRef, adapter: Adapter) -> None:
        """Raises SyncError where the engine lives, and cannot read it."""
        try:
            await self._engine.add_adapter(adapter)
        except Exception as error:
            await self._engine.check_health()
            reason = f"the engine cannot read it ({in_one_line(error)})"
            raise SyncError(ref.policy, ref.version, self._prober.name, math.nan, reason) from None

    def _set_aside(self, ref: PolicyRef) -> None:
        """Have a version loaded anew; requests under way end on the adapter that they began with."""
        self._loading.pop(ref, None)
        self._digests.pop(ref, None)
        if ref in self.adapters:
            self._replaced.setdefault(ref, []).append(self.adapters.pop(ref))

    async def _drop(self, adapter: Adapter, *, loaded: bool = True) -> None:
        try:
            if loaded:
                await self._engine.remove_adapter(adapter)
        finally:
            shutil.rmtree(adapter.path, ignore_errors=True)

    async def forget(self, newest: PolicyRef) -> None:
        """Drop the versions of a policy that are old and that no request uses."""
        old = [r for r in self.adapters if r.policy == newest.policy and r.version <= newest.version - self._keep]
        for ref in old:
            if ref in self.adapters and ref not in self._users and ref not in self._pins:  # or dropped meanwhile
                adapter = self.adapters.pop(ref)
                self._loading.pop(ref, None)
                self._digests.pop(ref, None)
                await self._drop(adapter)
        for ref in [ref for ref in self._replaced if ref not in self._users]:
            for adapter in self._replaced.pop(ref):
                await self._drop(adapter)


class WholeVersions:
    """All weights of an engine, one version at a time; version 0 is the model that the engine started with.

    Requests and loads are let in, in the order they came: one that needs another version than is there waits until the
    requests under way have ended, and has the weights replaced. So no answer mixes versions. Two versions that are
    asked for in turn are loaded in turn: a pipeline asks for the newest.

    Args:
        base: directory of version 0.
    """

    def __init__(self, engine: Engine, prober: Prober, fetch: Fetch, base: str) -> None:
        self._engine, self._prober, self._fetch, self._base = engine, prober, fetch, base
        self._turn = asyncio.Lock()  # first come, first served
        self._idle = asyncio.Event()
        self._idle.set()
        self._users = 0
        self._replacing: asyncio.Task[None] | None = None
        self._digest = ""
        self._failures = Failures()
        self._proofs = {PolicyRef(): Proof(ref=PolicyRef(), engine=prober.name, difference=0.0, drift=math.nan)}
        self.serves: PolicyRef | None = PolicyRef()  # None: what is loaded was not proved

    async def load(self, ref: PolicyRef) -> Proof:
        await self.acquire(ref)
        self.release(ref)
        return self._proofs[of_base(ref)]

    async def acquire(self, ref: PolicyRef, *, pin: bool = False, digest: str = "") -> None:
        async with self._turn:
            if self._replacing is not None:  # begun for a request that was given up meanwhile
                await asyncio.wait([self._replacing])
            if of_base(ref) != self.serves or digest not in ("", self._digest):
                if pin:
                    self._failures.check(ref, digest)
                await self._idle.wait()
                self._replacing = asyncio.create_task(self._replace(of_base(ref), digest))
                try:
                    await asyncio.shield(self._replacing)
                except SyncError as error:
                    self._failures.note(ref, digest, error)
                    raise
            self._users += 1
            self._idle.clear()

    def release(self, ref: PolicyRef) -> None:
        self._users -= 1
        if self._users == 0:
            self._idle.set()

    def close(self) -> None:
        pass

    async def _replace(self, ref: PolicyRef, digest: str) -> None:
        publication = await self._fetch(ref, digest) if ref.version else None
        left, self.serves = self.serves, None
        if publication is None:
            await self._engine.load_weights(self._base)
            self._proofs[ref] = await self._prober.prove_base(left or ref)
        else:
            await self._prober.leave_base(list(publication.digests.get(self._prober.dtype, {})))
            async with model_directory(publication) as directory:
                self._proofs[ref] = await self._load_and_prove(publication, directory)
        self.serves = ref
        self._digest = version_digest(publication.digests, publication.probe_logps) if publication else ""

    async def _load_and_prove(self, publication: Publication, directory: str) -> Proof:
        in_memory = await self._read(publication, directory)
        try:
            return await self._prober.prove(publication, None)
        except SyncError:
            if not in_memory:
                raise
        await self._engine.load_weights(directory)  # its learner laid out the next version meanwhile, or died
        return await self._prober.prove(publication, None)

    async def _read(self, publication: Publication, directory: str) -> bool:
        """See `Engine.load_weights`. Raises SyncError where the engine lives, and cannot read them."""
        try:
            return await self._engine.load_weights(directory, publication.shared)
        except Exception as error:
            await self._engine.check_health()
            ref, reason = publication.ref, f"the engine cannot read it ({in_one_line(error)})"
            raise SyncError(ref.policy, ref.version, self._prober.name, math.nan, reason) from None


async def score(engine: Engine, group: TokenGroup, adapter: Adapter | None) -> list[list[float]]:
    """Per-token log-probs of every response of a group."""
    return await asyncio.gather(
        *(engine.logprobs(group.prompt_ids, response, adapter=adapter) for response in group.response_ids)
    )


def of_base(ref: PolicyRef) -> PolicyRef:
    """The one name of version 0, which is the base whatever the policy."""
    return ref if ref.version else PolicyRef()


@asynccontextmanager
async def model_directory(publication: Publication) -> AsyncIterator[str]:
    """Where a whole model's files lie: their own place, or for as long as they are read one that they are put into."""
    if publication.directory is not None:
        yield publication.directory
        return
    place = Path(tempfile.mkdtemp(prefix="plumbline-weights-", dir=scratch(publication.files)))
    try:
        await asyncio.to_thread(write_files, place / "model", publication.files)
        yield str(place / "model")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def scratch(files: Mapping[str, bytes]) -> str | None:
    """Shared memory where it has room twice over, else None: the directory of temporary files."""
    memory = Path("/dev/shm")
    size = sum(map(len, files.values()))
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 2 * size else None


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Files of a publication, into a new directory."""
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
