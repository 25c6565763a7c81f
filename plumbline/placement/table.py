"""The lines of a plan, and what is said where it finds no room. Called by `plumbline.placement.plan`."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from plumbline.placement.machine import Machine
from plumbline.placement.memory import PROCESS_RAM_GIB, Need
from plumbline.placement.roles import Engines, Role
from plumbline.placement.seating import USABLE, Seats, memory_share, too_large


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the plan: so many of a role, each with so many GiB there, and what those consist of."""

    role: str
    count: int
    where: str
    gib: float
    why: str


def rows(
    engines: Engines | None, roles: Sequence[Role], seats: Seats | None, machine: Machine, *, cuda: bool
) -> list[Row]:
    """A line a role; two of engines where the endpoint has its own."""
    cards = iter(seats.cards) if seats else iter(())
    found = []
    if engines:
        replicas = seats.replicas if seats and cuda else engines.most
        for name, count in (("generator", replicas), ("endpoint", engines.beside)):
            if count:
                where = _where([next(cards, None) for _ in range(count)], machine) if cuda else "CPU"
                need = _engine(engines, seats, machine) if cuda else engines.ram
                found.append(Row(role=name, count=count, where=where, gib=need.gib, why=need.why))
    for one in roles:
        taken = [next(cards, None) for _ in range(one.count)]
        on_card = cuda and one.need is not None and (one.learner or one.gpus != 0)
        need = one.need if on_card and one.need else one.ram
        where = _where(taken, machine) if on_card else "CPU"
        found.append(Row(role=one.name, count=one.count, where=where, gib=need.gib, why=need.why))
    return found


def ram_of(found: Sequence[Row]) -> float:
    """GiB of RAM that they need at once; one on a card needs what any process does."""
    return sum(row.count * (row.gib if row.where == "CPU" else PROCESS_RAM_GIB) for row in found)


def over(engines: Engines | None, roles: Sequence[Role], seats: Seats, machine: Machine) -> Iterator[str]:
    """Cards on which more is needed than there is, as given keys can make it."""
    asked: defaultdict[int, list[tuple[float, str]]] = defaultdict(list)
    copies: list[tuple[float, str]] = []
    if engines:
        copies += [(_engine(engines, seats, machine).gib, "generator")] * (seats.replicas + engines.beside)
    for one in roles:
        copies += [(one.need.gib if one.need else 0.0, one.name)] * one.count
    for (gib, name), cards in zip(copies, seats.cards, strict=False):
        for card in cards:
            asked[card].append((gib, name))
    for card, there in sorted(asked.items()):
        if (total := sum(gib for gib, _ in there)) > machine.gib:
            told = ", ".join(f"{name} {gib:.1f}" for gib, name in there)
            yield f"GPU {card}: about {total:.1f} GiB are needed ({told}), it has {machine.gib:.1f}"


def problems(engines: Engines | None, roles: Sequence[Role], machine: Machine) -> list[str]:
    """Why no layout finds room."""
    usable = USABLE * machine.gib
    room = f"of {machine.gib:.0f} GiB a GPU, {usable:.0f} are dealt out"
    if large := too_large(roles, machine):
        return [f"{name} needs {need.gib:.1f} GiB on one GPU ({need.why}); {room}" for name, need in large]
    needs = [(one.count, one.need.gib, one.name) for one in roles if one.need]
    if engines:
        cards = next((n for n in (1, 2, 4, 8, 16) if engines.need(n).least <= usable), 1) if engines.splits else 1
        needs.insert(0, ((engines.replicas or 1) + engines.beside, cards * engines.need(cards).least, "generator"))
    told = ", ".join(f"{f'{count} × ' if count > 1 else ''}{name} {gib:.1f}" for count, gib, name in needs)
    count = "1 GPU has" if machine.gpus == 1 else f"{machine.gpus} GPUs have"
    return [f"{count} no room for all at once (GiB: {told}); {room}"]


def _engine(engines: Engines, seats: Seats | None, machine: Machine) -> Need:
    """What an engine takes of each of its cards: all that `memory_share` says, the rest of it for its cache."""
    cards = max(1, int(seats.engine)) if seats else 1
    need = engines.need(cards)
    gib = memory_share(engines, seats) * machine.gib if seats and machine.gib else need.least
    over = f" over {cards} cards" if cards > 1 else ""
    return Need(gib=gib, why=f"{need.weights:.1f} weights{over}, {max(0.0, gib - need.weights):.1f} KV cache and work")


def _where(cards: Sequence[tuple[int, ...] | None], machine: Machine) -> str:
    """GPU 0, GPU 1-3, GPU 0, 2; on a cluster, where Ray chooses them, how many."""
    if any(one is None for one in cards):
        return "GPUs to come" if machine.cluster else "no room"
    numbers = sorted({card for one in cards if one for card in one})
    if not numbers:
        return "GPU 0, not reserved"
    if machine.cluster:
        return f"{len(numbers)} of {machine.gpus} GPUs"
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"GPU {numbers[0]}-{numbers[-1]}"
    return f"GPU {', '.join(map(str, numbers))}"


def text(found: Sequence[Row]) -> str:
    """All lines under one another, as `plumbline doctor` prints them."""
    lines = [("role", "device", "GiB", "why")]
    for row in found:
        name = f"{row.count} × {row.role}" if row.count > 1 else row.role
        lines.append((name, row.where, f"{row.gib:.1f}", row.why))
    role, where, gib = (max(len(line[column]) for line in lines) for column in range(3))
    return "\n".join(f"{a:<{role}}  {b:<{where}}  {c:>{gib}}  {d}" for a, b, c, d in lines)


def line(found: Sequence[Row]) -> str:
    """The same in one line, as a run says it at its start."""
    told = (f"{f'{row.count} × ' if row.count > 1 else ''}{row.role} {row.where} ({row.gib:.1f} GiB)" for row in found)
    return f"placement: {'; '.join(told)}"
