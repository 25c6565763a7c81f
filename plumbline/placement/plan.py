"""Numbers in place of every `auto`, and the table that says why: a pure function of config, machine and model sizes.

`plumbline.doctor` calls it for every start of a run, an evaluation or a resume; `docs/placement.md` has the rules.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from plumbline.config.pipelines import Preference
from plumbline.config.section import bounds, replaced
from plumbline.config.tree import Config
from plumbline.placement.machine import Machine
from plumbline.placement.memory import bytes_of
from plumbline.placement.roles import Engines, Key, Part, Role, engines_of, given, learner_of, roles_of
from plumbline.placement.seating import USABLE, Seats, memory_share, seat, too_large, unseen
from plumbline.placement.sizes import Sizes
from plumbline.placement.table import Row, over, problems, ram_of, rows

MOST_THREADS = 8
"""Threads of one process on CPUs, where the machine has more: an estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `make_plan` found.

    Attributes:
        config: with numbers in place of every `auto`; 0 GPUs where there was no room.
        problems: what keeps a run from being placed, a line each.
        over: cards that given keys ask more of than they have, by the estimates.
        ram_gib: what processes on CPUs need of it at once, by the estimates.
    """

    config: Config
    rows: tuple[Row, ...]
    problems: tuple[str, ...]
    over: tuple[str, ...]
    ram_gib: float


def make_plan(
    config: Config,
    machine: Machine,
    sizes: Sizes,
    device: Literal["cpu", "cuda"],
    dtype: Literal["float32", "bfloat16"],
    *,
    part: Part = "run",
    splits: bool = True,
) -> Plan:
    """Place a run, or its evaluation, on a machine. What the config says is kept; the rest is planned around it.

    Args:
        device, dtype: what engines and learners compute on and in.
        splits: whether the engine can hold one model on several cards, as vLLM does.
    """
    cuda, width = device == "cuda", bytes_of(dtype)
    config = _with_reference(config, machine, cuda=cuda)
    engines = engines_of(config, sizes, width, part, splits=splits)
    roles = roles_of(config, sizes, width, part, cuda=cuda)
    sft = [learner_of(config.sft, ("sft",), sizes, width, cuda=cuda)] if config.sft and part == "run" else []
    stages = [(None, sft), (engines, roles)] if sft else [(engines, roles)]  # sft ends before the fleet starts
    settled = without_gpus(config, _threads(config, machine, device))
    table: list[list[Row]] = []
    failures: list[str] = []
    overfull: list[str] = []
    for engine, others in stages:
        seats = find_seats(engine, others, machine) if cuda else None
        table.append(rows(engine, others, seats, machine, cuda=cuda))
        if seats is not None:
            for key, values in _changes(engine, others, seats).items():
                settled = replaced(settled, key, values)
            overfull += over(engine, others, seats, machine)
        elif cuda:
            failures += problems(engine, others, machine)
    return Plan(
        config=settled,
        rows=tuple(row for stage in table for row in stage),
        problems=tuple(failures),
        over=tuple(overfull),
        ram_gib=max(map(ram_of, table)),
    )


def find_seats(engines: Engines | None, roles: Sequence[Role], machine: Machine) -> Seats | None:
    """With room for what given shares will need in truth; where that is too much, they are taken at their word. On a
    cluster, what finds no room on the nodes that there are waits for others."""
    trusting = [replace(one, need=None) if one.gpus is not None else one for one in roles]
    free = engines and replace(engines, settings=engines.settings.model_copy(update={"memory_share": "auto"}))
    found = seat(engines, roles, machine) or seat(free, trusting, machine) if machine.gpus else None
    if found is None and (not machine.gpus or (machine.cluster and not too_large(roles, machine))):
        return unseen(engines, roles)
    return found


def _with_reference(config: Config, machine: Machine, *, cuda: bool) -> Config:
    """Who answers for π0, where that is left open: the learners, where all hold it on GPUs of one machine. A cluster's
    may be far from its generators; on CPUs a small copy costs little and works beside them."""
    settings = config.fleet.reference
    if settings.replicas != "auto":
        return config
    asking = [p for p in config.pipelines if isinstance(p, Preference)]
    placed = settings.resources or settings.gpus not in ("auto", 0)
    one_box = cuda and not machine.cluster and all(p.keeps_base and p.learner.gpus != 0 for p in asking)
    reference = settings.model_copy(update={"replicas": "learner" if one_box and not placed else 1})
    return config.model_copy(update={"fleet": config.fleet.model_copy(update={"reference": reference})})


def _changes(engines: Engines | None, roles: Sequence[Role], seats: Seats) -> dict[Key, dict[str, Any]]:
    """What the config leaves open, by section."""
    found: dict[Key, dict[str, Any]] = {
        one.key: {"gpus": share} for one, share in zip(roles, seats.gpus, strict=True) if one.gpus is None
    }
    if engines:
        found["fleet", "generator"] = engine_changes(engines, seats)
    return found


def engine_changes(engines: Engines, seats: Seats) -> dict[str, Any]:
    """What the settings of generators leave open."""
    planned = {"gpus": seats.engine, "replicas": seats.replicas, "memory_share": memory_share(engines, seats)}
    return {key: value for key, value in planned.items() if getattr(engines.settings, key) == "auto"}


def without_gpus(config: Config, threads: int = 1) -> Config:
    """Every `auto` as it is without a GPU."""
    own = {"gpus": 0.0, "cpus": threads, "replicas": 1, "memory_share": USABLE}
    sections: list[tuple[Key, Any]] = [
        (("fleet", "generator"), config.fleet.generator),
        (("fleet", "scorer"), config.fleet.scorer),
        (("fleet", "reference"), config.fleet.reference),
        (("embedder",), config.embedder),
        (("sft", "learner"), config.sft and config.sft.learner),
        *((("pipelines", i, "learner"), one.learner) for i, one in enumerate(config.pipelines)),
    ]
    for key, section in sections:
        values = {name: number for name, number in own.items() if getattr(section, name, None) == "auto"}
        config = replaced(config, key, values) if values else config
    return config


def _threads(config: Config, machine: Machine, device: Literal["cpu", "cuda"]) -> int:
    """Processors of a machine without GPUs, shared evenly by those that compute for long: engines and learners."""
    if device == "cuda" or machine.cluster:
        return 1
    generator = config.fleet.generator
    engines = 1 if generator.replicas == "auto" else bounds(generator.replicas)[1]
    if config.serve.enabled and config.serve.placement == "replicas":
        engines += config.serve.most_replicas
    asked: list[tuple[int, float | None]] = [(engines, given(generator.cpus))] if config.methods else []
    asked += [(bounds(p.learner.workers)[1], given(p.learner.cpus)) for p in config.pipelines if p.trains]
    taken = sum(count * cpus for count, cpus in asked if cpus is not None)
    open_ = sum(count for count, cpus in asked if cpus is None)
    return max(1, min(MOST_THREADS, int((machine.cpus - taken) // max(1, open_))))
