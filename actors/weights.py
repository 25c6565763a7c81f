"""Versions of policies: a learner publishes one, generators fetch it (`actors.versions`).

The store holds the adapters that may still be asked for, in its own memory: a version outlives the learner worker that
made it. Of whole models it knows where they lie: a directory, and where nodes do not share one a box in Ray's object
store, from which they go from node to node without passing here.
"""

import asyncio
from dataclasses import replace
from typing import Any

from actors.channel import Box
from plumbline.errors import PlumblineError
from plumbline.records import PolicyRef, Publication

BOXES_KEPT = 2
"""Whole models of a policy in Ray's object store: the newest, and the one that requests under way were drawn for."""


class PolicyStore:
    """All policies of a run, by version.

    Args:
        keep: versions of one policy that are known, counted from the newest.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._versions: dict[str, dict[int, Publication]] = {}
        self._boxes: dict[str, dict[int, Box]] = {}
        self._failures: dict[str, PlumblineError] = {}
        self._generators: list[Any] = []
        self._changed = asyncio.Condition()

    async def publish(self, publication: Publication, box: Box | None = None) -> None:
        """Add a version. The same version again, from a restarted learner, is the same weights: the first stays.

        Args:
            box: with the files of a whole model, for who does not see its directory.
        """
        async with self._changed:
            versions = self._versions.setdefault(publication.ref.policy, {})
            versions.setdefault(publication.ref.version, publication)
            for old in sorted(versions)[: -self._keep]:
                del versions[old]
            if box is not None:
                boxes = self._boxes.setdefault(publication.ref.policy, {})
                boxes[publication.ref.version] = box
                for old in sorted(boxes)[:-BOXES_KEPT]:
                    del boxes[old]
            self._changed.notify_all()

    async def fetch(self, ref: PolicyRef) -> Publication:
        """A version, with the files of an adapter. Raises KeyError where there is none."""
        try:
            return self._versions[ref.policy][ref.version]
        except KeyError:
            raise KeyError(f"no published version {ref}") from None

    async def box(self, ref: PolicyRef) -> Box | None:
        """The files of a whole model, as long as the learner that boxed them lives; None where there are none."""
        return self._boxes.get(ref.policy, {}).get(ref.version)

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
