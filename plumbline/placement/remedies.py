"""Which key would make a run fit: changes are tried on the plan itself, the mildest first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from plumbline.config.learner import FullPolicy, LoraPolicy
from plumbline.config.section import bounds
from plumbline.config.tree import Config
from plumbline.placement.machine import Machine
from plumbline.placement.plan import Plan

Planner = Callable[[Config, Machine], Plan]
MORE = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of GPUs that are tried where no key helps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of a config, and what a user would write."""

    keys: str
    config: Config


def remedy(config: Config, machine: Machine, plan: Planner) -> str:
    """The first change with which the plan has room; else how many such GPUs would have."""
    changes = list(_changes(config, machine.gpus))
    for change in changes:
        if not plan(change.config, machine).problems:
            return f"{change.keys} would make it fit"
    for gpus in (count for count in MORE if count > machine.gpus):
        more = replace(machine, gpus=gpus, per_node=max(machine.per_node, min(gpus, 8)))
        for change in (Change(keys="", config=config), *_changes(config, gpus)):
            if not plan(change.config, more).problems:
                return f"{gpus} such GPUs would hold it{f', with {change.keys}' if change.keys else ''}"
    return "give it larger GPUs or a smaller model"


def _changes(config: Config, gpus: int) -> Iterator[Change]:
    """One change alone, then several."""
    checkpointing = ("`learner.gradient_checkpointing: true`", _checkpointing)
    lora = ("`policy: {type: lora}`", _lora)
    reference = ("`fleet.reference.gpus: 0`", _reference_on_cpus)
    zero = [(f"`learner: {{strategy: deepspeed, zero: 3, workers: {n}}}`", _zero(n)) for n in range(2, gpus + 1)]
    orders = [
        *[[one] for one in (checkpointing, *zero, lora, reference)],
        *[[checkpointing, one] for one in (*zero, lora, reference)],
        *[[checkpointing, one, reference] for one in (*zero, lora)],
        *[[checkpointing, one, lora] for one in zero],
        *[[checkpointing, one, lora, reference] for one in zero],
    ]
    seen: set[tuple[str, ...]] = set()
    for order in orders:
        changed, keys = config, []
        for key, change in order:
            before, changed = changed, change(changed)
            if changed != before:
                keys.append(key)
        if keys and tuple(keys) not in seen:
            seen.add(tuple(keys))
            yield Change(keys=" and ".join(filter(None, [", ".join(keys[:-1]), keys[-1]])), config=changed)


def _each(config: Config, change: Callable[[Any], dict[str, Any]]) -> Config:
    """Every pipeline, and the sft stage, with what `change` says of it."""
    pipelines = [one.model_copy(update=change(one)) for one in config.pipelines]
    sft = config.sft and config.sft.model_copy(update=change(config.sft))
    return config.model_copy(update={"pipelines": pipelines, "sft": sft})


def _checkpointing(config: Config) -> Config:
    return _each(config, lambda one: {"learner": one.learner.model_copy(update={"gradient_checkpointing": True})})


def _lora(config: Config) -> Config:
    whole = FullPolicy(type="full")
    return _each(config, lambda one: {"policy": LoraPolicy()} if getattr(one, "policy", None) == whole else {})


def _zero(workers: int) -> Callable[[Config], Config]:
    def change(one: Any) -> dict[str, Any]:
        settings = {"strategy": "deepspeed", "zero": 3, "workers": max(workers, bounds(one.learner.workers)[0])}
        return {"learner": one.learner.model_copy(update=settings)}

    return lambda config: _each(config, change)


def _reference_on_cpus(config: Config) -> Config:
    fleet = config.fleet
    reference = fleet.reference.model_copy(update={"gpus": 0.0})
    return config.model_copy(update={"fleet": fleet.model_copy(update={"reference": reference})})
