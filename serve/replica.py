"""An engine of the endpoint's own: the same generator that runs draw from, held by a replica of Ray Serve."""

import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from actors.engines.seam import EngineSpec
from actors.generator import Generator
from actors.spawn import fetcher
from plumbline.records import Head, TokenGroup, UserRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """All that a replica needs; picklable.

    Attributes:
        run_dir: where versions lie; None serves a plain model.
        store_name: of the policy store of a live run, which has newer ones.
        tolerance: nats that a version's proof may be off.
        node: the resource of a node that has `run_dir`, where not all have it.
    """

    engine: EngineSpec
    probe: tuple[TokenGroup, ...]
    tolerance: float
    run_dir: Path | None
    store_name: str | None
    node: Mapping[str, float] | None = None


class Replica:
    """Proves each version before it answers from it, as a generator does."""

    async def __init__(self, spec: ReplicaSpec) -> None:
        self._generator = Generator(
            f"replica-{uuid.uuid4().hex[:8]}",
            "vllm",
            spec.engine,
            spec.probe,
            spec.tolerance,
            fetcher(spec.store_name, spec.run_dir, spec.node),
            keep=1,
            pinned=spec.engine.max_adapters - 1,
        )
        await self._generator.start()

    async def answer(self, request: UserRequest) -> AsyncIterator[Head | str]:
        """See `Generator.answer`."""
        async for piece in self._generator.answer(request):
            yield piece

    async def check_health(self) -> None:
        """Ray Serve starts another in its place where this raises."""
        await self._generator.check_health()

    async def ready(self) -> bool:
        """Replicas that are starting are not asked. Raises RuntimeError where the engine is dead."""
        await self.check_health()
        return True
