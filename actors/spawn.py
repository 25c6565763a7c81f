"""Where plain classes become Ray actors: resources, placement, restarts, and a teardown that leaves no process behind.

The only file with `ray.remote`. A driver calls `start_ray` (`actors.cluster`), fills a `Fleet`, and closes it whatever
happens.
"""

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.channel import Channel
from actors.cluster import start_ray, stop_ray
from actors.desk import Desk
from actors.embedder import Embedder, EmbedderSpec
from actors.engines.seam import EngineKind, EngineSpec
from actors.generator import Generator
from actors.learning.learner import Trainer
from actors.learning.worker import LearnerSpec
from actors.lost import GONE, who_was_lost
from actors.reference import Reference, ReferenceSpec
from actors.scorer import Scorer, ScorerSpec
from actors.versions import Fetch
from actors.weights import PolicyStore
from plumbline.config.fleet import Embedder as EmbedderFleet
from plumbline.config.fleet import GeneratorFleet, ReferenceFleet, ScorerFleet
from plumbline.config.section import bounds, planned
from plumbline.errors import ConfigError, LostError, PlumblineError, RunError, in_one_line
from plumbline.placement.machine import Machine, sign_in, this_machine
from plumbline.records import PolicyRef, Publication, TokenGroup
from plumbline.runs.policies import read_publication, version_digest, version_directory

RESTARTS = 100
"""Deaths of one generator or scorer that Ray mends before a run gives up."""

_REPLACED: dict[str, Any] = {"max_restarts": RESTARTS, "max_task_retries": -1}
"""Options of an actor that may die with its node, as spot nodes do: it restarts elsewhere, its calls are repeated."""

LEAVING_S = 5.0
"""Seconds from when a leaving generator is no longer listed until it is stopped: an endpoint may still ask it then."""


def look_at_cluster(run_dir: Path | None = None) -> Machine:
    """The nodes of the cluster of RAY_ADDRESS, as they are now; joins it and leaves it again where need be.

    Args:
        run_dir: a directory, or one to be, that nodes are asked whether they see.

    Raises:
        ConfigError: it does not answer, or torch sees no GPU on a node that offers some.
    """
    joined = ray.is_initialized()
    try:
        if not joined:
            start_ray(0)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in nodes}
        gpus = {node: count for node, count in gpus.items() if count}
        look = ray.remote(this_machine)
        # Without a GPU of its own a task sees all of them, also those that are taken.
        places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in gpus]
        seen = ray.get([look.options(num_cpus=0, scheduling_strategy=place).remote() for place in places])
        with sign_in(run_dir) as sign:
            places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
            sees = ray.remote(Path.exists)
            there = ray.get([sees.options(num_cpus=0, scheduling_strategy=p).remote(sign) for p in places if sign])
        blind = [node["Resources"] for node, one in zip(nodes, there, strict=False) if not one]
    except (ConnectionError, RayError) as error:
        raise ConfigError(f"RAY_ADDRESS: the cluster does not answer ({in_one_line(error)})") from None
    finally:
        if not joined:
            stop_ray()
    if any(machine.gpus == 0 for machine in seen):
        raise ConfigError("RAY_ADDRESS: a node offers GPUs, but torch sees none there; give it a driver for its CUDA")
    return Machine(
        gpus=sum(gpus.values()),
        gib=min((machine.gib for machine in seen), default=0.0),
        cpus=int(sum(node["Resources"].get("CPU", 0) for node in nodes)),
        ram_gib=0.0,
        per_node=min(gpus.values(), default=0),
        cluster=True,
        blind=tuple(blind),
    )


def beside_driver() -> dict[str, Any]:
    """Options of a light actor that holds what a run cannot lose: it is where the driver is, never on a spot node."""
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": node}


@dataclass
class Fleet:
    """Handles of the actors that all pipelines of a run share. Their names in Ray's dashboard begin with `label`."""

    label: str
    store: Any
    store_name: str
    generators: list[Any] = field(default_factory=list)
    generator_names: dict[Any, str] = field(default_factory=dict)
    rewards: dict[str, list[Any]] = field(default_factory=dict)  # replicas by the reward's key in the config
    reference: list[Any] = field(default_factory=list)
    embedder: list[Any] = field(default_factory=list)
    desks: dict[str, Any] = field(default_factory=dict)
    others: list[Any] = field(default_factory=list)
    _trainer: Any = None
    _named: Counter[str] = field(default_factory=Counter)
    _make_generator: Callable[[str], Any] | None = None

    def _name(self, role: str) -> str:
        self._named[role] += 1
        return f"{self.label}/{role}-{self._named[role] - 1}"

    def add_generators(
        self,
        settings: GeneratorFleet,
        choice: EngineKind,
        spec: EngineSpec,
        probe: Sequence[TokenGroup],
        tolerance: float,
        keep: int,
        pinned: int = 0,
        run_dir: Path | None = None,
    ) -> None:
        """Start the pool, with as many as there always are. Engines load in the background; `ready` waits for them."""
        fetch = fetcher(self.store_name, run_dir)

        def make(name: str) -> Any:
            # A lost call is not repeated: the pool asks another, and this one only once it has proved its versions.
            actor = ray.remote(Generator).options(
                name=f"{self.label}/{name}",
                num_cpus=planned(settings.cpus),
                num_gpus=planned(settings.gpus),
                resources=settings.resources,
                max_concurrency=1000,
                **{**_REPLACED, "max_task_retries": 0},
            )
            return actor.remote(name, choice, spec, list(probe), tolerance, fetch, keep, pinned)

        self._make_generator = make
        for _ in range(bounds(planned(settings.replicas))[0]):
            self.add_generator()

    def add_generator(self) -> Any:
        """Start one more, which loads in the background; returns its handle. A name is never used twice."""
        assert self._make_generator is not None
        self._named["generator"] += 1
        name = f"generator-{self._named['generator'] - 1}"
        generator = self._make_generator(name)
        self.generators.append(generator)
        self.generator_names[generator] = name
        return generator

    async def remove_generator(self, generator: Any) -> None:
        """Stop one that is asked nothing more; what it is still answering ends first, unless it is starting or lost."""
        with contextlib.suppress(RayError):
            # One that is still loading hears nothing until it has.
            there, _ = await asyncio.wait([asyncio.ensure_future(gather(generator.start.remote()))], timeout=1)
            if there and not next(iter(there)).exception():
                await asyncio.sleep(LEAVING_S)
                await generator.drained.remote()
                await generator.close.remote()
        with contextlib.suppress(RayError):
            ray.kill(generator)
        self.generators.remove(generator)

    def add_scorers(self, settings: ScorerFleet, spec: ScorerSpec, role: str = "scorer") -> list[Any]:
        """Start replicas of one reward; returns their handles."""
        return self._start(Scorer, role, spec, settings, settings.replicas, cpus=settings.cpus)

    def add_reference(self, settings: ReferenceFleet, spec: ReferenceSpec, count: int) -> None:
        """Start `count` copies of the frozen model."""
        self.reference += self._start(Reference, "reference", spec, settings, count)

    def add_embedders(self, settings: EmbedderFleet, spec: EmbedderSpec) -> None:
        """Start the sentence embedder's replicas."""
        self.embedder += self._start(Embedder, "embedder", spec, settings, settings.replicas)

    def _start(
        self,
        kind: type,
        role: str,
        spec: Any,
        settings: ScorerFleet | ReferenceFleet | EmbedderFleet,
        count: int,
        cpus: float = 0,
    ) -> list[Any]:
        actor = ray.remote(kind)
        where = {"num_cpus": cpus, "num_gpus": planned(settings.gpus), "resources": settings.resources, **_REPLACED}
        return [actor.options(name=self._name(role), **where).remote(spec) for _ in range(count)]

    def add_channel(self, slots: int, learner: str, done: int = 0) -> Any:
        """A channel for one learner, which goes on after step `done`."""
        actor = ray.remote(Channel).options(name=self._name(f"channel-{learner}"), **beside_driver())
        channel = actor.remote(slots, learner, done)
        self.others.append(channel)
        return channel

    def add_desk(self, learner: str) -> Any:
        """Where a pipeline asks its learner what π0 says."""
        actor = ray.remote(Desk).options(name=self._name(f"desk-{learner}"), **beside_driver())
        desk = self.desks[learner] = actor.remote(learner)
        self.others.append(desk)
        return desk

    def trainer(self) -> Any:
        """The actor from which all learners' Ray Train runs are started."""
        if self._trainer is None:
            # Ray Train puts the controllers of its runs where this actor is.
            options = {"name": self._name("trainer"), "max_restarts": -1, **beside_driver()}
            self._trainer = ray.remote(Trainer).options(**options).remote(self.label)
            self.others.append(self._trainer)
        return self._trainer

    @property
    def _scorers(self) -> list[Any]:
        return [one for replicas in self.rewards.values() for one in replicas]

    @property
    def placed(self) -> bool:
        """Whether its actors have been started."""
        return self._make_generator is not None

    def warm(self) -> None:
        """Have what loads π0 later do all the rest of its start now."""
        for one in [*self.generators, *self.reference]:
            one.warm.remote()

    async def ready(self) -> None:
        """Wait until every engine, reward, reference and embedder is loaded. Raises what kept one from loading."""
        waits = [started(g) for g in self.generators]
        waits += [one.ready.remote() for one in [*self._scorers, *self.reference, *self.embedder]]
        await gather(*waits)

    async def restored(self) -> None:
        """Wait until Ray has started anew what of the store and the trainer died."""
        asked = [self.store.generators, *([self._trainer.ready] if self._trainer else [])]
        await gather(*(one.options(max_task_retries=-1).remote() for one in asked))

    async def enlist(self, generators: Sequence[Any]) -> None:
        """Tell the store which generators may be asked: an endpoint reads it there."""
        await ask(self.store.enlist.remote(list(generators)))

    def close(self) -> None:
        """Stop every actor; an engine gets a moment to end its own processes."""
        with contextlib.suppress(RayError):
            closing = [g.close.options(max_task_retries=0).remote() for g in self.generators]
            ray.wait(closing, num_returns=len(closing), timeout=5)
        beside = [*self._scorers, *self.reference, *self.embedder, *self.others]
        for handle in [*self.generators, *beside, self.store]:
            with contextlib.suppress(RayError):
                ray.kill(handle)


def fetcher(store_name: str | None, run_dir: Path | None, node: Mapping[str, float] | None = None) -> Fetch:
    """How a generator gets a version: from the run's policy store, or an older one from the run's directory.

    A whole model is read where its files lie, if that place is seen here, and is else sent from its learner's node.

    Args:
        node: the resource of a node that has the run's directory, for where it is not seen.

    Raises:
        KeyError: there is no such version in either, or a whole model's files are nowhere any more.
    """

    async def fetch(ref: PolicyRef, digest: str) -> Publication:
        if store_name is not None:
            # By name: a handle among the arguments would put them where a restart may not find them.
            store: Any = ray.get_actor(store_name)
            with contextlib.suppress(KeyError):
                held: Publication = await store.fetch.options(max_task_retries=-1).remote(ref)
                if digest not in ("", version_digest(held.digests, held.probe_logps)):
                    raise KeyError(ref)  # its learner was started anew, and made it anew in the run's directory
                if held.files or (held.directory and Path(held.directory).is_dir()):
                    return held
                if box := await store.box.options(max_task_retries=-1).remote(ref):
                    with contextlib.suppress(ObjectLostError):  # its learner died since
                        return replace(held, files=await box.ref, directory=None)
        if run_dir is not None and node and not (run_dir / "config.yaml").is_file():
            read: Any = ray.remote(read_publication).options(num_cpus=0, resources=node)
            return await read.remote(run_dir, ref, True)
        if run_dir is None or not version_directory(run_dir, ref).is_dir():
            raise KeyError(f"no published version {ref}")
        return await asyncio.to_thread(read_publication, run_dir, ref)

    return fetch


def start_fleet(keep: int, run: str = "plumbline") -> Fleet:
    """A fleet with nothing but its policy store, which holds the newest `keep` versions of every policy.

    Args:
        run: what its actors' names begin with, followed by letters of its own: two runs may have one name.
    """
    label = f"{run}-{uuid.uuid4().hex[:8]}"
    name = f"{label}/policy-store"
    # One that died begins empty: pipelines that wait for it go on from their checkpoints, and publish anew.
    store = ray.remote(PolicyStore).options(name=name, max_restarts=-1, **beside_driver()).remote(keep)
    return Fleet(label=label, store=store, store_name=name)


def started(generator: Any) -> Any:
    """A ref that is there once it has loaded, on whatever node it is started, and as often as it dies meanwhile."""
    return generator.start.options(max_task_retries=-1).remote()


def start_learner(fleet: Fleet, spec: LearnerSpec, channel: Any, desk: Any = None) -> "asyncio.Future[None]":
    """Run a learner beside the event loop; the future ends when the learner does, with a RunError where it failed.

    Not in a thread of this process: one that still calls Ray while Ray shuts down here would end the process at once.
    """
    learner = asyncio.ensure_future(ask(fleet.trainer().run.remote(spec, channel, fleet.store, desk)))
    learner.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # an interrupted run never asks
    return learner


async def gather(*refs: Any) -> list[Any]:
    """Await several refs; a remote error of ours is raised as itself, any other as a RunError."""
    try:
        return list(await asyncio.gather(*refs))
    except RayError as error:
        raise unwrap(error) from None


async def ask(ref: "Coroutine[Any, Any, Any] | Any") -> Any:
    """Await one ref; see `gather`."""
    return (await gather(ref))[0]


def unwrap(error: RayError) -> BaseException:
    """Our own error inside a Ray error, a LostError of a dead process or node, or a RunError that says what it was."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, RayError):
        return unwrap(cause)
    if isinstance(cause, PlumblineError):
        return cause
    if isinstance(error, (*GONE, ObjectLostError, NodeDiedError)):
        return LostError(who_was_lost(error))
    return RunError(in_one_line(cause if isinstance(cause, Exception) else error))
