"""The one pool of generators that all pipelines of a run share, fairly.

A pipeline asks for admission before each batch of requests. The pool bounds the answers that are outstanding, as
engines have places for answers whatever their length, and lets batches in by start-time fair queueing (Goyal, Vin and
Cheng, 1996): each batch gets a start on a clock that runs on tokens over weight, behind the pipeline's batch before it
and never before now, and the earliest start goes first. So a newcomer does not wait behind another's queue, nobody
saves up what it did not use, and what a finished pipeline leaves goes to the others at once.

Generators join and leave while it works (`pipelines.autoscaler`): what a lost one was asked goes to another.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from actors.metrics import POOL_TOKENS
from plumbline.errors import LostError, RunError
from plumbline.records import PolicyRef

T = TypeVar("T")

ASKED = 8
"""Generators that are asked the same, one after another lost over it, before it is to blame itself."""


@dataclass(slots=True, eq=False)
class Member:
    """A generator of the pool, the answers it was asked for and has not given, and what keeps it from leaving."""

    generator: Any
    load: int = 0
    batches: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket:
    """A batch that waits since `asked`: so many `answers`, for `pipeline`, `start` on the pool's clock."""

    pipeline: str
    answers: int
    start: float
    asked: float
    turn: "asyncio.Future[Member]"


@dataclass(slots=True)
class Account:
    """What one pipeline had of the pool, and the start of its next batch.

    Attributes:
        sampled: tokens.
        waiting: batches that wait, and `since` when none of them was admitted.
        longest_wait: most seconds in which some of its batches waited and none was admitted.
    """

    next_start: float = 0.0
    sampled: int = 0
    waiting: int = 0
    since: float = 0.0
    longest_wait: float = 0.0


class Pool:
    """Admission to generators.

    Args:
        generators: handles of those that it begins with; a batch goes to the one with the least outstanding.
        capacity: answers that may be outstanding, for each of them. A larger batch is admitted alone.
        batch: answers that pipelines should ask for at a time, alike for all: what they take turns with.

    Attributes:
        current: the version of each policy that all of its generators have proved, or are proving.
    """

    def __init__(self, generators: Sequence[Any], capacity: int, batch: int = 1) -> None:
        self.capacity, self.batch = capacity, batch
        self.accounts: dict[str, Account] = {}
        self.current: dict[str, PolicyRef] = {}
        self._members = [Member(one) for one in generators]
        self._waiting: list[Ticket] = []
        self._clock = 0.0  # start of the batch that was admitted last
        self._failure: Exception | None = None

    @asynccontextmanager
    async def admit(self, pipeline: str, answers: int, tokens: int, share: float = 1.0) -> AsyncIterator[Any]:
        """Wait for places of `answers`; yields the generator to ask, and frees the places at the end.

        Args:
            tokens: that they may have together, by which pipelines take turns.

        Raises:
            Exception: what `fail` was given.
        """
        async with self._admitted(pipeline, answers, self._start(pipeline, tokens, share)) as member:
            yield member.generator

    async def ask(
        self, pipeline: str, answers: int, tokens: int, question: Callable[[Any], Awaitable[T]], share: float = 1.0
    ) -> T:
        """What a generator answers to `question`, as `admit` lets it in. Where it is lost over it, it leaves, and
        another is asked.

        That is in the turn that the batch had: before what its pipeline asked later.

        Raises:
            RunError: `ASKED` generators were lost over it, which is no chance any more.
            Exception: what the question raised, or `fail` was given.
        """
        start = self._start(pipeline, tokens, share)
        for _ in range(ASKED):
            async with self._admitted(pipeline, answers, start) as member:
                try:
                    return await question(member.generator)
                except LostError:
                    self._remove(member)
        raise RunError(f"{ASKED} generators died one after another over the same {answers} answers")

    def count(self, pipeline: str, tokens: int) -> None:
        """Note `tokens` that were sampled for a pipeline."""
        self._account(pipeline).sampled += tokens
        POOL_TOKENS.inc(tokens, pipeline=pipeline)

    def join(self, generator: Any) -> None:
        """From now on it is asked too."""
        self._members.append(Member(generator))
        self._serve()

    def lose(self, generator: Any) -> None:
        """It is asked no more; what it was asked ends by itself."""
        for member in [one for one in self._members if one.generator == generator]:
            self._remove(member)

    async def leave(self, generator: Any) -> None:
        """It is asked no more; returns once all that it was asked has ended."""
        for member in [one for one in self._members if one.generator == generator]:
            self._remove(member)
            member.idle.clear()
            if member.batches:
                await member.idle.wait()

    @contextmanager
    def hold(self, generator: Any) -> Iterator[None]:
        """One of its generators does not leave before the end, though it may be lost.

        Raises:
            LostError: it has left.
        """
        member = next((one for one in self._members if one.generator == generator), None)
        if member is None:
            raise LostError("it has left the pool")
        member.batches += 1
        try:
            yield
        finally:
            self._release(member)

    def fail(self, error: Exception) -> None:
        """Everyone who waits, now or later, gets `error`."""
        self._failure = error
        for ticket in self._waiting:
            self._account(ticket.pipeline).waiting -= 1
            if not ticket.turn.done():
                ticket.turn.set_exception(error)
        self._waiting.clear()

    @property
    def generators(self) -> list[Any]:
        """Those that are asked, the least loaded first."""
        return [member.generator for member in sorted(self._members, key=lambda one: one.load)]

    @property
    def queue(self) -> int:
        """Batches that wait."""
        return len(self._waiting)

    @property
    def lag(self) -> float:
        """Seconds for which the batch that has waited longest waits."""
        return time.monotonic() - min(ticket.asked for ticket in self._waiting) if self._waiting else 0.0

    @property
    def outstanding(self) -> int:
        """Answers that were asked for and are not there yet."""
        return sum(member.load for member in self._members)

    @property
    def demand(self) -> float:
        """Generators that the answers admitted and those that wait would fill."""
        return (self.outstanding + sum(ticket.answers for ticket in self._waiting)) / max(self.capacity, 1)

    def shares(self) -> dict[str, float]:
        """Each pipeline's part of the tokens sampled so far."""
        total = sum(account.sampled for account in self.accounts.values())
        return {name: account.sampled / total for name, account in self.accounts.items()} if total else {}

    def _account(self, pipeline: str) -> Account:
        return self.accounts.setdefault(pipeline, Account())

    def _start(self, pipeline: str, tokens: int, share: float) -> float:
        """Where on the clock a new batch begins."""
        account = self._account(pipeline)
        start = max(self._clock, account.next_start)
        account.next_start = start + tokens / share
        return start

    @asynccontextmanager
    async def _admitted(self, pipeline: str, answers: int, start: float) -> AsyncIterator[Member]:
        if self._failure is not None:
            raise self._failure
        account, now = self._account(pipeline), time.monotonic()
        turn = asyncio.get_running_loop().create_future()
        ticket = Ticket(pipeline=pipeline, answers=answers, start=start, asked=now, turn=turn)
        self._waiting.append(ticket)
        account.since = account.since if account.waiting else now
        account.waiting += 1
        self._serve()
        try:
            member = await ticket.turn
        except asyncio.CancelledError:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                account.waiting -= 1
            elif not ticket.turn.cancelled() and ticket.turn.exception() is None:
                self._free(ticket, ticket.turn.result())
            raise
        try:
            yield member
        finally:
            self._free(ticket, member)

    def _serve(self) -> None:
        """Admit while there is room, the earliest start first.

        Whoever is next waits for room, and is not overtaken by a smaller batch: a large one would starve.
        """
        while self._waiting and self._members:
            ticket = min(self._waiting, key=lambda one: one.start)
            outstanding = self.outstanding
            if outstanding and outstanding + ticket.answers > self.capacity * len(self._members):
                return
            self._waiting.remove(ticket)
            member = min(self._members, key=lambda one: one.load)
            member.load += ticket.answers
            member.batches += 1
            self._clock = max(self._clock, ticket.start)  # a batch that is asked again starts in the past
            account, now = self.accounts[ticket.pipeline], time.monotonic()
            account.longest_wait = max(account.longest_wait, now - account.since)
            account.since = now
            account.waiting -= 1
            ticket.turn.set_result(member)

    def _free(self, ticket: Ticket, member: Member) -> None:
        member.load -= ticket.answers
        self._release(member)
        self._serve()

    def _release(self, member: Member) -> None:
        member.batches -= 1
        if not member.batches:
            member.idle.set()

    def _remove(self, member: Member) -> None:
        if member in self._members:
            self._members.remove(member)
