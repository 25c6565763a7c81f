"""How cards are dealt out: layouts from the widest to the narrowest, of which the first that finds room is taken."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from plumbline.placement.machine import Machine
from plumbline.placement.memory import Need
from plumbline.placement.packing import down, pack, up
from plumbline.placement.roles import Engines, Role

USABLE = 0.9
"""Share of a card that is dealt out: estimates err, and PyTorch's allocator leaves gaps. vLLM's own default is near."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seats:
    """A layout that found room: GPUs of an engine and of one of each role, and the cards of each process in order."""

    engine: float
    replicas: int
    gpus: tuple[float, ...]
    cards: tuple[tuple[int, ...], ...]


def seat(engines: Engines | None, roles: Sequence[Role], machine: Machine) -> Seats | None:
    """The first layout that finds room, from the widest to the narrowest; None where none does."""
    usable = USABLE * machine.gib
    if too_large(roles, machine):
        return None
    least = [_least(one, usable) for one in roles]
    for shares in (*_learners_apart(roles, least, machine.gpus), least):
        beside = [share for one, share in zip(roles, shares, strict=True) for _ in range(one.count)]
        for gpus, replicas in _whole_engines(engines, machine):
            count = replicas + engines.beside if engines else 0
            if (cards := pack([gpus] * count + beside, machine.gpus)) is not None:
                return Seats(engine=gpus, replicas=replicas, gpus=tuple(shares), cards=tuple(cards))
    if engines is None or (engines.gpus or 0) >= 1:
        return None
    beside = [share for one, share in zip(roles, least, strict=True) for _ in range(one.count)]
    replicas = engines.replicas or 1
    for share in _engine_shares(engines, usable):
        if (cards := pack([share] * (replicas + engines.beside) + beside, machine.gpus)) is not None:
            return Seats(engine=share, replicas=replicas, gpus=tuple(least), cards=tuple(cards))
    return None


def too_large(roles: Sequence[Role], machine: Machine) -> list[tuple[str, Need]]:
    """Roles that no card can hold one of, by name."""
    usable = USABLE * machine.gib
    return [(one.name, one.need) for one in roles if one.gpus is None and one.need and one.need.gib > usable]


def _least(role: Role, usable: float) -> float:
    """What one asks of Ray at least: its share of a card's memory; what the config says, where that is more."""
    if role.need is None or role.gpus == 0 or (role.gpus or 0) >= 1:
        return role.gpus or 0.0
    if role.gpus is None and role.apart:
        return 1.0
    return max(role.gpus or 0.0, min(1.0, up(role.need.gib / usable)))


def _learners_apart(roles: Sequence[Role], least: Sequence[float], gpus: int) -> Iterator[list[float]]:
    """Learners on at most half of the cards, each alone on one or as few together as that allows; of this half, what
    is small has one card."""
    auto = [one.learner and one.gpus is None for one in roles]
    workers = sum(one.count for one, mine in zip(roles, auto, strict=True) if mine)
    small = any(share > 0 for one, share in zip(roles, least, strict=True) if not one.learner)
    cards = gpus // 2 - small
    if workers and cards > 0:
        together = down(1 / math.ceil(workers / cards))
        yield [max(share, together) if mine else share for share, mine in zip(least, auto, strict=True)]


def _whole_engines(engines: Engines | None, machine: Machine) -> Iterator[tuple[float, int]]:
    """GPUs of an engine and number of generators, the most generators first."""
    if engines is None:
        yield 0, 0
        return
    cards = engines.gpus if engines.gpus is not None else _cards_of_engine(engines, machine)
    if cards is None or 0 < cards < 1:
        return
    most = int(machine.gpus // cards) if cards else 1
    for replicas in [engines.replicas] if engines.replicas else range(most, 0, -1):
        yield cards, replicas


def _cards_of_engine(engines: Engines, machine: Machine) -> float | None:
    """The fewest cards that hold the model with the least KV cache; vLLM cuts attention heads, so they divide those."""
    share = engines.memory_share or USABLE
    for cards in (1, 2, 4, 8, 16) if engines.splits else (1,):
        fits = engines.need(cards).least <= share * machine.gib
        if fits and cards <= machine.per_node and engines.shape.heads % cards == 0:
            return float(cards)
    return None


def _engine_shares(engines: Engines, usable: float) -> Iterator[float]:
    """Shares of a card that one engine may have, the largest first: no more than it could ever use."""
    if engines.gpus is not None or engines.memory_share is not None:
        yield max(engines.gpus or 0.0, min(1.0, up((engines.memory_share or 0.0) / USABLE)))
        return
    need = engines.need(1)
    largest, least = min(1.0, up(need.most / usable)), up(need.least / usable)
    yield from (hundredths / 100 for hundredths in range(round(largest * 100), round(least * 100) - 1, -1))


def unseen(engines: Engines | None, roles: Sequence[Role]) -> Seats:
    """On a cluster whose GPUs are yet to come: whole cards, and one for all that is small."""
    small = [one for one in roles if not one.learner and one.need is not None and one.gpus is None]
    share = down(1 / max(1, sum(one.count for one in small)))
    auto = [share if one in small else float(one.learner) for one in roles]
    gpus = [mine if one.gpus is None else one.gpus for one, mine in zip(roles, auto, strict=True)]
    asked = engines.gpus if engines and engines.gpus is not None else 1.0
    return Seats(engine=asked, replicas=(engines and engines.replicas) or 1, gpus=tuple(gpus), cards=())


def memory_share(engines: Engines, seats: Seats) -> float:
    return engines.memory_share or (down(seats.engine * USABLE, 1000) if 0 < seats.engine < 1 else USABLE)
