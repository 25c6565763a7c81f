"""What a placed run asks of the machines it runs on: processors, GPUs, and resources that nodes offer by name."""

from collections import Counter
from collections.abc import Mapping

from plumbline.config.fleet import GeneratorFleet
from plumbline.config.learner import Learner
from plumbline.config.pipelines import Preference
from plumbline.config.section import Auto, bounds, planned
from plumbline.config.tree import Config


def demand(config: Config, *, most: bool = False) -> Counter[str]:
    """Ray resources that the actors of a run hold at once: `CPU`, `GPU`, and names of the nodes' own.

    Args:
        most: with as many of a role as there may ever be; else with as few as the run can work with.
    """
    at = int(most)
    total = _fleet(config, at)
    if config.serve.enabled and config.serve.placement == "replicas":
        generator = config.fleet.generator
        total += _held(bounds(config.serve.replicas)[at], generator.cpus, generator.gpus, config.serve.resources)
    for one in config.pipelines:
        if one.trains:
            total += _workers(one.learner, at)
    if config.sft:  # the fleet starts beside it only where that costs no more room (`beside_sft`)
        total |= _workers(config.sft.learner, at)
    return total


def beside_sft(config: Config) -> Counter[str]:
    """What must be free while the `sft` section trains, for the run's fleet to start beside it: its actors, and what
    its learner may yet grow by.
    """
    grown = Counter[str]()
    if config.sft:
        grown = _workers(config.sft.learner, 1) - _workers(config.sft.learner, 0)
    return _fleet(config, 0) + grown


def _fleet(config: Config, at: int) -> Counter[str]:
    """Generators, rewards, reference and embedder; `at` the least of their number, 0, or the most, 1."""
    fleet = config.fleet
    generator = fleet.generator
    total: Counter[str] = Counter()
    if config.methods:
        engines = max(1, bounds(planned(generator.replicas))[at])
        total += _held(engines, generator.cpus, generator.gpus, generator.resources)
    total += _held(
        len(config.rewards) * fleet.scorer.replicas, fleet.scorer.cpus, fleet.scorer.gpus, fleet.scorer.resources
    )
    total += _held(reference_replicas(config), 0, fleet.reference.gpus, fleet.reference.resources)
    if config.embedder and any(p.embeds for p in config.methods):
        total += _held(config.embedder.replicas, 0, config.embedder.gpus, config.embedder.resources)
    return total


def reference_replicas(config: Config) -> int:
    """Copies of π0 that a run has for its preference pipelines; 0 where their learners answer, or there are none."""
    replicas = planned(config.fleet.reference.replicas)
    asked = any(isinstance(p, Preference) for p in config.pipelines)
    return 0 if isinstance(replicas, str) or not asked else replicas


def named(config: Config) -> list[str]:
    """Names of the nodes' own resources that a run asks for."""
    return sorted(demand(config, most=True).keys() - {"CPU", "GPU"})


def one_of(role: Learner | GeneratorFleet) -> Counter[str]:
    """What one worker of a learner, or one generator, holds."""
    return _held(1, role.cpus, role.gpus, role.resources)


def _workers(learner: Learner, at: int) -> Counter[str]:
    return _held(bounds(learner.workers)[at], learner.cpus, learner.gpus, learner.resources)


def _held(count: int, cpus: float | Auto, gpus: float | Auto, resources: Mapping[str, float]) -> Counter[str]:
    each = {"CPU": planned(cpus), "GPU": planned(gpus), **resources}
    return Counter({name: count * amount for name, amount in each.items()})
