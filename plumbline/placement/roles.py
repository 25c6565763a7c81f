"""The processes of a run as a plan sees them: how many, what each needs, and what its config already says."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from plumbline.config.data import ClassifierReward
from plumbline.config.demand import reference_replicas
from plumbline.config.fleet import GeneratorFleet
from plumbline.config.pipelines import Pipeline
from plumbline.config.section import Auto, bounds, planned
from plumbline.config.tree import Config
from plumbline.placement.memory import (
    EngineNeed,
    Need,
    adapter_slots,
    embedder_need,
    engine_need,
    engine_ram,
    learner_need,
    reference_need,
    scorer_need,
)
from plumbline.placement.sizes import Shape, Sizes

Part = Literal["run", "evaluation"]
"""What is placed: a whole run, or `plumbline evaluate`, which has neither learners nor what only they need."""
Key = tuple[str | int, ...]
"""The place of a section in a config, such as ("pipelines", 0, "learner")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """Processes of one section.

    Attributes:
        gpus: what the config says; None for `auto`.
        need: on a card; nothing where it computes on CPUs whatever there is.
        ram: of one on CPUs.
        apart: no two of them on one card, which collectives between them would not survive.
    """

    name: str
    key: Key
    count: int
    gpus: float | None
    need: Need | None
    ram: Need
    learner: bool = False
    apart: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """The generators, and engines of the endpoint's own, which have the same settings.

    Attributes:
        replicas: the least that there always are; None for `auto`.
        most: as many generators as there may ever be.
        beside: engines of the endpoint's own.
        slots: adapters that one has room for, and their largest rank.
        splits: whether one may go over several cards.
    """

    settings: GeneratorFleet
    max_len: int
    shape: Shape
    width: int
    slots: tuple[int, int]
    replicas: int | None
    most: int
    beside: int = 0
    splits: bool

    @property
    def gpus(self) -> float | None:
        """What the config says; None for `auto`."""
        return given(self.settings.gpus)

    @property
    def memory_share(self) -> float | None:
        """What the config says; None for `auto`."""
        return given(self.settings.memory_share)

    def need(self, cards: int) -> EngineNeed:
        """On each of so many cards."""
        return engine_need(self.settings, self.max_len, self.shape, self.width, self.slots, cards)

    @property
    def ram(self) -> Need:
        """Of one on CPUs."""
        return engine_ram(self.settings, self.shape, self.width)


def engines_of(config: Config, sizes: Sizes, width: int, part: Part, *, splits: bool) -> Engines | None:
    """Nothing where no method generates."""
    if not config.methods:
        return None
    settings, serve = config.fleet.generator, config.serve
    users = serve.enabled and part == "run"
    pinned = serve.pinned if users and serve.placement == "pool" else 0
    replicas = settings.replicas
    return Engines(
        settings=settings,
        max_len=planned(config.model.max_len),
        shape=sizes.model,
        width=width,
        slots=adapter_slots(config, config.kept_versions * max(1, len(config.served)) + pinned),
        replicas=None if replicas == "auto" else max(1, bounds(replicas)[0]),
        most=1 if replicas == "auto" else bounds(replicas)[1],
        beside=serve.most_replicas if users and serve.placement == "replicas" else 0,
        splits=splits,
    )


def roles_of(config: Config, sizes: Sizes, width: int, part: Part, *, cuda: bool) -> list[Role]:
    """All but engines, in the order in which a run starts them: what is small first, then the learners."""
    roles = [*_small(config, sizes, width, part, cuda=cuda)]
    if part == "run":
        roles += [
            learner_of(p, ("pipelines", i), sizes, width, cuda=cuda) for i, p in enumerate(config.pipelines) if p.trains
        ]
    return roles


def _small(config: Config, sizes: Sizes, width: int, part: Part, *, cuda: bool) -> Iterator[Role]:
    fleet = config.fleet
    if config.rewards:
        judge = config.evaluation and config.evaluation.judge
        shapes = [
            (sizes.rewards[key], one.batch_tokens)
            for key, one in config.rewards.items()
            if key in sizes.rewards and isinstance(one, ClassifierReward)
        ]
        yield Role(
            name=", ".join(name for name, one in (("scorer", config.reward), ("judge", judge)) if one),
            key=("fleet", "scorer"),
            count=len(config.rewards) * fleet.scorer.replicas,
            gpus=given(fleet.scorer.gpus),
            need=scorer_need(shapes, cuda=cuda) if shapes else None,
            ram=scorer_need(shapes, cuda=False),
        )
    if part == "run" and (copies := reference_replicas(config)):
        yield Role(
            name="reference",
            key=("fleet", "reference"),
            count=copies,
            gpus=given(fleet.reference.gpus),
            need=reference_need(fleet.reference, sizes.model, width, cuda=cuda),
            ram=reference_need(fleet.reference, sizes.model, width, cuda=False),
        )
    if part == "run" and config.embedder and any(p.embeds for p in config.methods):
        shape = sizes.embedder or Shape(parameters=0)
        yield Role(
            name="embedder",
            key=("embedder",),
            count=config.embedder.replicas,
            gpus=given(config.embedder.gpus),
            need=embedder_need(shape, cuda=cuda),
            ram=embedder_need(shape, cuda=False),
        )


def learner_of(section: Pipeline, key: Key, sizes: Sizes, width: int, *, cuda: bool) -> Role:
    """A learner with as few workers as it may have."""
    settings = section.learner
    workers, most = bounds(settings.workers)
    return Role(
        name=f"learner of {section.name}",
        key=(*key, "learner"),
        count=workers,
        gpus=given(settings.gpus),
        need=learner_need(section, sizes.model, width, workers, cuda=cuda),
        ram=learner_need(section, sizes.model, width, workers, cuda=False),
        learner=True,
        apart=most > 1,
    )


def given(value: float | Auto) -> float | None:
    """What a config says; None for `auto`."""
    return None if value == "auto" else value
