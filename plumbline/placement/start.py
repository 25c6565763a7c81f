"""From a config to one without `auto`: lengths, device, sizes, plan. Called by `plumbline.doctor` and `serve`."""

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

from plumbline.config.demand import demand
from plumbline.config.fleet import GeneratorFleet
from plumbline.config.tree import Config
from plumbline.errors import ConfigError
from plumbline.placement.lengths import settle_lengths
from plumbline.placement.machine import Machine
from plumbline.placement.memory import bytes_of
from plumbline.placement.plan import Plan, engine_changes, find_seats, make_plan, without_gpus
from plumbline.placement.remedies import remedy
from plumbline.placement.roles import Engines, Part
from plumbline.placement.sizes import Shape, read_sizes
from plumbline.placement.table import problems

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A plan, and the machine, device and dtype that it was made for; `remedy` says what would make it fit."""

    plan: Plan
    machine: Machine
    device: Device
    dtype: Dtype
    remedy: str = ""


def place(config: Config, machine: Machine, part: Part = "run") -> Placed:
    """Plan a run or its evaluation. Whether it fits is for the caller to ask: `Plan.problems`.

    Raises:
        ConfigError: `fleet.device: cuda` where there is no GPU.
            A length is above what its model reads.
        ModelError: the size of a model cannot be read.
    """
    config, device = settle_lengths(config), run_device(config, machine)
    dtype, sizes = resolve_dtype(config.model.dtype, device), read_sizes(config)

    def plan(config: Config, machine: Machine) -> Plan:
        splits = may_split(config.fleet.engine)
        return make_plan(config, machine, sizes, device, dtype, part=part, splits=splits)

    made = plan(config, machine)
    told = remedy(config, machine, plan) if made.problems else ""
    return Placed(plan=made, machine=machine, device=device, dtype=dtype, remedy=told)


def place_engines(
    settings: GeneratorFleet,
    machine: Machine,
    device: Device,
    dtype: Dtype,
    shape: Shape,
    *,
    engine: Literal["auto", "vllm", "transformers"] = "auto",
    replicas: int,
    max_len: int,
    slots: tuple[int, int],
) -> GeneratorFleet:
    """Engines that have a machine to themselves, as those of an endpoint over a finished run; nothing is left `auto`.

    Args:
        slots: adapters that one has room for, and their rank.

    Raises:
        ConfigError: they do not fit.
    """
    engines = Engines(
        settings=settings,
        max_len=max_len,
        shape=shape,
        width=bytes_of(dtype),
        slots=slots,
        replicas=replicas,
        most=replicas,
        splits=may_split(engine),
    )
    values = {"gpus": 0.0, "cpus": 1, "replicas": replicas, "memory_share": 1.0}
    planned = {key: value for key, value in values.items() if getattr(settings, key) == "auto"}
    if device == "cuda":
        seats = find_seats(engines, [], machine)
        if seats is None:
            told = "; ".join(problems(engines, [], machine))
            raise ConfigError(f"serve.replicas: {told}; take fewer replicas, or more GPUs")
        planned |= engine_changes(engines, seats)
    return settings.model_copy(update=planned)


def run_device(config: Config, machine: Machine) -> Device:
    """Where engines and learners compute. A cluster may have no GPU yet: there, asking for GPUs says so."""
    coming = machine.cluster and demand(without_gpus(config))["GPU"] > 0
    return resolve_device(config.fleet.device, machine, coming=coming)


def resolve_device(choice: Literal["auto", "cpu", "cuda"], machine: Machine, *, coming: bool = False) -> Device:
    """`auto` is CUDA where there is a device. Raises ConfigError where `cuda` is asked for and there is none."""
    if choice == "cuda" and not machine.gpus and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError("fleet.device: cuda, but no CUDA device is visible here; write cpu or auto")
    return "cuda" if choice == "cuda" or (choice == "auto" and (machine.gpus > 0 or coming)) else "cpu"


def resolve_dtype(choice: Literal["auto", "float32", "bfloat16"], device: Device) -> Dtype:
    """`auto` is float32 on CPUs, where bfloat16 is several times slower, and bfloat16 on GPUs."""
    if choice != "auto":
        return choice
    return "float32" if device == "cpu" else "bfloat16"


def may_split(engine: Literal["auto", "vllm", "transformers"]) -> bool:
    """Whether one model may lie on several cards: vLLM's can."""
    return engine == "vllm" or (engine == "auto" and importlib.util.find_spec("vllm") is not None)
