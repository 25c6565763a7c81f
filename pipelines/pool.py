"""The one pool of generators that all pipelines of a run share, fairly.

A pipeline asks for admission before each batch of requests. The pool bounds the tokens that are outstanding, and lets
batches in by start-time fair queueing (Goyal, Vin and Cheng, 1996): each batch gets a start on a clock that runs on
tokens over weight, behind the pipeline's batch before it and never before now, and the earliest start goes first. So a
newcomer does not wait behind another's queue, nobody saves up what it did not use, and what a finished pipeline leaves
goes to the others at once.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket:
    """A batch that waits: the `tokens` it may sample, for `pipeline`, and its `start` on the pool's clock."""

    pipeline: str
    tokens: int
    start: float
    turn: "asyncio.Future[int]"


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


@dataclass(slots=True)
class Pool:
    """Admission to `generators`.

    Args:
        generators: handles; a batch goes to the one with the least outstanding.
        capacity: tokens that may be outstanding over all of them. A larger batch is admitted alone.
        batch: answers that pipelines should ask for at a time, alike for all: what they take turns with.
    """

    generators: Sequence[Any]
    capacity: int
    batch: int = 1
    accounts: dict[str, Account] = field(default_factory=dict)
    _waiting: list[Ticket] = field(default_factory=list)
    _loads: list[int] = field(default_factory=list)
    _clock: float = 0.0  # start of the batch that was admitted last

    @asynccontextmanager
    async def admit(self, pipeline: str, tokens: int, share: float = 1.0) -> AsyncIterator[Any]:
        """Wait for a place of `tokens`; yields the generator to ask, and frees the place at the end."""
        account = self.accounts.setdefault(pipeline, Account())
        start = max(self._clock, account.next_start)
        account.next_start = start + tokens / share
        turn = asyncio.get_running_loop().create_future()
        ticket = Ticket(pipeline=pipeline, tokens=tokens, start=start, turn=turn)
        self._waiting.append(ticket)
        account.since = account.since if account.waiting else time.monotonic()
        account.waiting += 1
        self._serve()
        try:
            index = await ticket.turn
        except asyncio.CancelledError:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                account.waiting -= 1
            elif not ticket.turn.cancelled():
                self._free(ticket, ticket.turn.result())
            raise
        try:
            yield self.generators[index]
        finally:
            self._free(ticket, index)

    def count(self, pipeline: str, tokens: int) -> None:
        """Note `tokens` that were sampled for a pipeline."""
        self.accounts.setdefault(pipeline, Account()).sampled += tokens

    @property
    def queue(self) -> int:
        """Batches that wait."""
        return len(self._waiting)

    @property
    def outstanding(self) -> int:
        """Tokens admitted and not yet answered."""
        return sum(self._loads)

    def shares(self) -> dict[str, float]:
        """Each pipeline's part of the tokens sampled so far."""
        total = sum(account.sampled for account in self.accounts.values())
        return {name: account.sampled / total for name, account in self.accounts.items()} if total else {}

    def _serve(self) -> None:
        """Admit while there is room, the earliest start first.

        Whoever is next waits for room, and is not overtaken by a smaller batch: a large one would starve.
        """
        self._loads = self._loads or [0] * len(self.generators)
        while self._waiting:
            ticket = min(self._waiting, key=lambda one: one.start)
            if self.outstanding and self.outstanding + ticket.tokens > self.capacity:
                return
            self._waiting.remove(ticket)
            index = self._loads.index(min(self._loads))
            self._loads[index] += ticket.tokens
            self._clock = ticket.start
            account, now = self.accounts[ticket.pipeline], time.monotonic()
            account.longest_wait = max(account.longest_wait, now - account.since)
            account.since = now
            account.waiting -= 1
            ticket.turn.set_result(index)

    def _free(self, ticket: Ticket, index: int) -> None:
        self._loads[index] -= ticket.tokens
        self._serve()
