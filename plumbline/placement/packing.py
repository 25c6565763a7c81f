"""Shares of cards to cards, as Ray deals them out: `plumbline.placement.plan` tries a plan on it."""

import math
from collections.abc import Sequence

UNITS = 10_000
"""Ray counts a resource in ten-thousandths."""


def pack(shares: Sequence[float], cards: int) -> list[tuple[int, ...]] | None:
    """The cards of each share in order, or None where one finds no room.

    A whole number takes free cards; a share below 1 the fullest card that has room for it, as Ray does.
    """
    free = [UNITS] * cards
    where: list[tuple[int, ...]] = []
    for share in shares:
        units = round(share * UNITS)
        if share >= 1:
            found = [card for card in range(cards) if free[card] == UNITS][: int(share)]
            if len(found) < share:
                return None
            units = UNITS
        else:
            fitting = [card for card in range(cards) if free[card] >= units]
            found = [min(fitting, key=lambda card: (free[card], card))] if units and fitting else []
            if units and not found:
                return None
        for card in found:
            free[card] -= units
        where.append(tuple(found))
    return where


def up(share: float) -> float:
    """In hundredths, never less."""
    return math.ceil(share * 100 - 1e-9) / 100


def down(share: float, parts: int = 100) -> float:
    """In hundredths or other parts, never more."""
    return math.floor(share * parts + 1e-9) / parts
