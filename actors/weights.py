"""Versions of policies: a learner publishes one, generators fetch it, and every engine proves that it arrived.

The store holds the files of the versions that may still be asked for, in its own memory: a version outlives the learner
worker that made it. `prove` is the proof itself (DESIGN.md, Weights).
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from plumbline.errors import PlumblineError, SyncError
from plumbline.records import PolicyRef, Publication
from plumbline.runs.policies import is_adapter

TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 2.5e-1}
"""Nats a token by which a probe response's log-prob may differ between learner and engine. Measured: 1e-6 in float32,
near 1e-2 in bfloat16 (STACK.md 7); the margin covers unlike kernels."""


WHOLE_KEPT = 2
"""Whole models of a policy that the store holds: the newest, and the one that requests under way were drawn for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What a passed proof measured. `drift` is the step from the reference version that the engine showed, as a share
    of the step that the learner took: near 1, or nan where that step drowns in numerical noise."""

    ref: PolicyRef
    engine: str
    difference: float
    drift: float


def prove(
    publication: Publication,
    *,
    engine: str,
    measured: Sequence[float],
    reference: PolicyRef,
    reference_measured: Sequence[float],
    tolerance: float,
) -> Proof:
    """Compare an engine's probe log-probs [N] with the learner's, in value and in the change since `reference`.

    `reference` is the version that the engine served before (or the base). The change must have the learner's
    direction and size: a value test alone would pass an engine that kept the old weights after a small step.

    Raises:
        SyncError: names version, engine and the largest difference.
    """
    expected = publication.probe_logps
    is_previous = reference.version == publication.ref.version - 1 and reference.version > 0
    before = publication.previous_probe_logps if is_previous else publication.base_probe_logps
    difference = max((abs(a - b) for a, b in zip(measured, expected, strict=True)), default=math.inf)

    def fail(reason: str) -> SyncError:
        return SyncError(publication.ref.policy, publication.ref.version, engine, difference, reason)

    if not all(map(math.isfinite, [difference, *measured])):  # max() overlooks a nan that does not come first
        raise fail("its probe log-probs are not finite")
    step = [a - b for a, b in zip(expected, before, strict=True)]
    shown = [a - b for a, b in zip(measured, reference_measured, strict=True)]
    noise = _rms([a - b for a, b in zip(reference_measured, before, strict=True)]) + 1e-6
    size = _rms(step)
    if size > 5 * noise:
        drift = sum(a * b for a, b in zip(step, shown, strict=True)) / sum(a * a for a in step)
        if abs(drift) < 0.5:
            raise fail(f"it still answers as {reference}")
        if abs(drift - 1) > 0.5:
            raise fail(f"it moved {drift:.2f} times as far from {reference} as the learner did")
    else:
        drift = math.nan
    if difference > tolerance:
        raise fail(f"its probe log-probs are not the learner's within {tolerance:g}")
    return Proof(ref=publication.ref, engine=engine, difference=difference, drift=drift)


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / max(len(values), 1))


class PolicyStore:
    """All policies of a run, by version.

    Args:
        keep: versions of one policy whose files stay in memory, counted from the newest; of whole models at most
            `WHOLE_KEPT`, for each is as large as the base.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._versions: dict[str, dict[int, Publication]] = {}
        self._failures: dict[str, PlumblineError] = {}
        self._generators: list[Any] = []
        self._changed = asyncio.Condition()

    async def publish(self, publication: Publication) -> None:
        """Add a version. The same version again, from a restarted learner, is the same checkpoint: the first stays."""
        async with self._changed:
            versions = self._versions.setdefault(publication.ref.policy, {})
            versions.setdefault(publication.ref.version, publication)
            for old in sorted(versions)[: -self._keep]:
                del versions[old]
            whole = sorted(v for v, held in versions.items() if held.files and not is_adapter(held.files))
            for old in whole[:-WHOLE_KEPT]:
                versions[old] = replace(versions[old], files={})
            self._changed.notify_all()

    async def fetch(self, ref: PolicyRef) -> Publication:
        """A version with its files, or without those of an old whole model. Raises KeyError where there is none."""
        try:
            return self._versions[ref.policy][ref.version]
        except KeyError:
            raise KeyError(f"no published version {ref}") from None

    async def wait(self, ref: PolicyRef) -> Publication:
        """Wait until `ref` is published; returned without its files. Raises what `fail` was given."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: ref.version in self._versions.get(ref.policy, {}) or ref.policy in self._failures
            )
            if ref.version in self._versions.get(ref.policy, {}):
                return replace(self._versions[ref.policy][ref.version], files={})
            raise self._failures[ref.policy]

    async def fail(self, policy: str, error: PlumblineError) -> None:
        """The policy will get no further version: whoever waits for one gets `error`."""
        async with self._changed:
            self._failures[policy] = error
            self._changed.notify_all()

    async def enlist(self, generators: list[Any]) -> None:
        """Note handles of the generators that there are."""
        self._generators = generators

    async def generators(self) -> list[Any]:
        """Handles of the generators that there are, for whoever asks them beside the run's own process."""
        return self._generators
