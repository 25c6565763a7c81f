"""A bounded, leased queue of boxed object refs between a pipeline and its learner.

A *slot* is reserved before a part is drawn and given back once the version that the part made is proved: the number of
slots bounds how far generation runs ahead, which is the bound on staleness. A part is handed out as a *lease*, in the
order of its step; it leaves the queue only when it is acknowledged. Ray Train notices a dead holder and starts another,
which attaches: what the dead one had taken goes to it.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from actors.metrics import CHANNEL_LEASED, CHANNEL_QUEUED
from plumbline.errors import PlumblineError, RunError


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """An object ref (or, in unit tests, the object) in a record, which Ray passes on without reading it."""

    ref: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A part that `holder` is working on."""

    step: int
    box: Box
    holder: str


class Channel:
    """One producer, one consumer at a time, parts numbered by step.

    Args:
        slots: parts that may be between `reserve` and `release`.
        pipeline: whose parts these are, for the metrics.
        done: the step after which the producer goes on.
    """

    def __init__(self, slots: int, pipeline: str = "", done: int = 0) -> None:
        self._pipeline = pipeline
        self._free = slots
        self._acknowledged = done
        self._next = done + 1
        self._holder: str | None = None
        self._boxes: dict[int, Box] = {}
        self._closed = False
        self._failure: PlumblineError | None = None
        self._changed = asyncio.Condition()

    async def reserve(self) -> None:
        """Wait for a free slot and take it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free > 0 or self._failure)
            self._raise_failure()
            self._free -= 1

    async def release(self) -> None:
        """Give a slot back."""
        async with self._changed:
            self._free += 1
            self._changed.notify_all()

    async def put(self, step: int, box: Box) -> None:
        """Add a part. Parts may arrive out of order; they are leased in order."""
        async with self._changed:
            self._boxes[step] = box
            self._count()
            self._changed.notify_all()

    async def acknowledged(self) -> int:
        """The step up to which all is done for good: no part of it is here any more."""
        return self._acknowledged

    async def attach(self, holder: str, done: int) -> None:
        """A consumer (re)starts after step `done`: it alone leases from now on, beginning with the next step.

        Raises:
            RunError: the next step is not here any more, or was never to come from here.
        """
        async with self._changed:
            if not self._acknowledged <= done < self._next:
                raise RunError(
                    f"the learner of {self._pipeline} goes on after step {done}, but up to step {self._acknowledged} "
                    f"its parts are done for good, and step {self._next} is the next; resume the run, from a run "
                    "directory that all machines see or with `storage_path`"
                )
            self._holder = holder
            self._boxes = {step: box for step, box in self._boxes.items() if step > done}
            self._next = done + 1
            self._count()
            self._changed.notify_all()

    async def lease(self, holder: str) -> Lease | None:
        """The next part in order, waiting for it; None once the channel is closed and empty, or `holder` replaced."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    self._failure
                    or holder != self._holder
                    or self._next in self._boxes
                    or (self._closed and self._next > max(self._boxes, default=0))
                )
            )
            self._raise_failure()
            if holder != self._holder or self._next not in self._boxes:
                return None
            self._next += 1
            self._count()
            return Lease(step=self._next - 1, box=self._boxes[self._next - 1], holder=holder)

    async def peek(self, step: int) -> Box:
        """The box of a leased part, for the other workers of the lease's holder."""
        return self._boxes[step]

    async def ack(self, step: int, holder: str) -> None:
        """All parts up to `step` are done for good. From anybody but the present holder it is late, and ignored."""
        async with self._changed:
            if holder == self._holder:
                self._acknowledged = max(self._acknowledged, step)
                self._boxes = {s: box for s, box in self._boxes.items() if s > step}
                self._count()
                self._changed.notify_all()

    async def close(self) -> None:
        """No further parts will come."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def fail(self, error: PlumblineError) -> None:
        """Everyone who waits, now or later, gets `error`."""
        async with self._changed:
            self._failure = error
            self._changed.notify_all()

    async def depth(self) -> int:
        """Parts that wait or are leased."""
        return len(self._boxes)

    def _count(self) -> None:
        leased = sum(step < self._next for step in self._boxes)
        CHANNEL_LEASED.set(leased, pipeline=self._pipeline)
        CHANNEL_QUEUED.set(len(self._boxes) - leased, pipeline=self._pipeline)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
