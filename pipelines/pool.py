"""The one pool of generators that all pipelines of a run share, fairly.

A pipeline asks for admission before each batch of requests. The pool admits tokens up to a bound, and gives a free
place to the waiting pipeline that has the least outstanding for its weight: none starves, and what a finished one
leaves goes to the others at once.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket:
    """A batch that waits: `tokens` it may sample, for `pipeline` with weight `share`."""

    pipeline: str
    tokens: int
    share: float
    turn: "asyncio.Future[int]"


@dataclass(slots=True)
class Account:
    """What one pipeline had of the pool: tokens asked for and not yet answered, tokens sampled, seconds waited."""

    outstanding: int = 0
    sampled: int = 0
    waited: float = 0.0
    longest_wait: float = 0.0


@dataclass(slots=True)
class Pool:
    """Admission to `generators`.

    Args:
        generators: handles; a batch goes to the one with the least outstanding.
        capacity: tokens that may be outstanding over all of them. A larger batch is admitted alone.
    """

    generators: Sequence[Any]
    capacity: int
    accounts: dict[str, Account] = field(default_factory=dict)
    _waiting: list[Ticket] = field(default_factory=list)
    _loads: list[int] = field(default_factory=list)

    @asynccontextmanager
    async def admit(self, pipeline: str, tokens: int, share: float = 1.0) -> AsyncIterator[Any]:
        """Wait for a place of `tokens`; yields the generator to ask, and frees the place at the end."""
        account = self.accounts.setdefault(pipeline, Account())
        started = time.monotonic()
        ticket = Ticket(pipeline=pipeline, tokens=tokens, share=share, turn=asyncio.get_running_loop().create_future())
        self._waiting.append(ticket)
        self._serve()
        try:
            index = await ticket.turn
        except asyncio.CancelledError:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            elif not ticket.turn.cancelled():
                self._free(ticket, ticket.turn.result())
            raise
        waited = time.monotonic() - started
        account.waited += waited
        account.longest_wait = max(account.longest_wait, waited)
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
        """Admit while there is room, the pipeline with the least outstanding for its weight first.

        Whoever is next waits for room, and is not overtaken by a smaller batch: a large one would starve.
        """
        self._loads = self._loads or [0] * len(self.generators)
        while self._waiting:
            ticket = min(self._waiting, key=lambda one: self.accounts[one.pipeline].outstanding / one.share)
            if self.outstanding and self.outstanding + ticket.tokens > self.capacity:
                return
            self._waiting.remove(ticket)
            index = self._loads.index(min(self._loads))
            self._loads[index] += ticket.tokens
            self.accounts[ticket.pipeline].outstanding += ticket.tokens
            ticket.turn.set_result(index)

    def _free(self, ticket: Ticket, index: int) -> None:
        self._loads[index] -= ticket.tokens
        self.accounts[ticket.pipeline].outstanding -= ticket.tokens
        self._serve()
