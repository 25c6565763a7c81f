"""What a run asks of the machines it runs on: processors, GPUs, and resources that nodes offer by name."""

import os
from collections import Counter
from collections.abc import Mapping

from plumbline.config.pipelines import Preference
from plumbline.config.section import bounds
from plumbline.config.tree import Config


def demand(config: Config, *, most: bool = False) -> Counter[str]:
    """Ray resources that the actors of a run hold at once: `CPU`, `GPU`, and names of the nodes' own.

    Args:
        most: with as many of a role as there may ever be; else with as few as the run can work with.
    """
    at, fleet = int(most), config.fleet
    generator = fleet.generator
    total: Counter[str] = Counter()
    if config.methods:
        engines = max(1, bounds(generator.replicas)[at])
        total += _held(engines, generator.cpus, generator.gpus, generator.resources)
    if config.serve.enabled and config.serve.placement == "replicas":
        total += _held(bounds(config.serve.replicas)[at], generator.cpus, generator.gpus, config.serve.resources)
    rewards = bool(config.reward) + bool(config.evaluation and config.evaluation.judge)
    total += _held(rewards * fleet.scorer.replicas, fleet.scorer.cpus, fleet.scorer.gpus, fleet.scorer.resources)
    total += _held(reference_replicas(config), 0, fleet.reference.gpus, fleet.reference.resources)
    if config.embedder and any(p.embeds for p in config.methods):
        total += _held(config.embedder.replicas, 0, config.embedder.gpus, config.embedder.resources)
    for one in (p.learner for p in config.pipelines):
        total += _held(bounds(one.workers)[at], one.cpus, one.gpus, one.resources)
    if config.sft:  # it ends before the fleet starts
        one = config.sft.learner
        total |= _held(bounds(one.workers)[at], one.cpus, one.gpus, one.resources)
    return total


def reference_replicas(config: Config) -> int:
    """Copies of π0 that a run has for its preference pipelines; 0 where their learners answer, or there are none."""
    settings = config.fleet.reference
    asking = [p for p in config.pipelines if isinstance(p, Preference)]
    if not asking or settings.replicas == "learner":
        return 0
    if settings.replicas != "auto":
        return settings.replicas
    # A cluster's learners may be far from its generators; on CPUs a small copy costs little and works beside them.
    one_box = not os.environ.get("RAY_ADDRESS") and all(p.keeps_base and p.learner.gpus for p in asking)
    return 0 if one_box and not settings.gpus and not settings.resources else 1


def named(config: Config) -> list[str]:
    """Names of the nodes' own resources that a run asks for."""
    return sorted(demand(config, most=True).keys() - {"CPU", "GPU"})


def _held(count: int, cpus: float, gpus: float, resources: Mapping[str, float]) -> Counter[str]:
    each = {"CPU": cpus, "GPU": gpus, **resources}
    return Counter({name: count * amount for name, amount in each.items()})
