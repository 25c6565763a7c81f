"""Where plain classes become Ray actors: resources, placement, restarts, and a teardown that leaves no process behind.

The only file with `ray.remote`. A driver calls `start_ray`, fills a `Fleet`, and closes it whatever happens.
"""

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from actors.channel import Channel
from actors.embedder import Embedder, EmbedderSpec
from actors.engine import EngineSpec
from actors.generator import Generator
from actors.learner import Trainer
from actors.reference import Reference, ReferenceSpec
from actors.scorer import Scorer, ScorerSpec
from actors.train_loop import LearnerSpec
from actors.weights import PolicyStore
from plumbline.errors import PlumblineError, RunError, in_one_line
from plumbline.fleet import GeneratorFleet, ReferenceFleet, ScorerFleet
from plumbline.records import PolicyRef, Publication, TokenGroup

RESTARTS = 100
"""Deaths of one generator or scorer that Ray mends before a run gives up."""

_DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead learner worker is noticed within this
    "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "true",  # an engine's own processes die with it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def start_ray(cpus: int) -> None:
    """Join the cluster of RAY_ADDRESS (a submitted job has one), else start Ray here with at least `cpus` CPUs."""
    for key, value in _DEFAULTS.items():
        os.environ.setdefault(key, value)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    # Actors import what the driver can: the packages of a checkout, and a reward function beside the config.
    paths = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    settings = {key: os.environ[key] for key in _DEFAULTS}
    common["runtime_env"] = {"env_vars": {"PYTHONPATH": paths, **settings}}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**common)
    else:
        ray.init(address="local", num_cpus=max(cpus, os.cpu_count() or 1), include_dashboard=False, **common)
    # Ray's subreaper ignores SIGCHLD in this process too, and then every `subprocess` here would return 0.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@dataclass
class Fleet:
    """Handles of the actors that all pipelines of a run share."""

    store: Any
    store_name: str
    generators: list[Any] = field(default_factory=list)
    scorer: list[Any] = field(default_factory=list)
    judge: list[Any] = field(default_factory=list)
    reference: list[Any] = field(default_factory=list)
    embedder: list[Any] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)
    _trainer: Any = None

    def add_generators(
        self,
        settings: GeneratorFleet,
        choice: Literal["vllm", "transformers"],
        spec: EngineSpec,
        probe: Sequence[TokenGroup],
        tolerance: float,
        keep: int,
    ) -> None:
        """Start the pool. The engines load in the background; `ready` waits for them."""
        store_name = self.store_name

        async def fetch(ref: PolicyRef) -> Publication:
            # By name: a handle among the arguments would put them where a restart may not find them.
            store: Any = ray.get_actor(store_name)
            return await store.fetch.remote(ref)

        for i in range(settings.replicas):
            name = f"generator-{i}"
            actor = ray.remote(Generator).options(
                num_cpus=settings.cpus,
                num_gpus=settings.gpus,
                max_restarts=RESTARTS,
                max_task_retries=-1,
                max_concurrency=1000,
            )
            self.generators.append(actor.remote(name, choice, spec, list(probe), tolerance, fetch, keep))

    def add_scorers(self, settings: ScorerFleet, spec: ScorerSpec) -> list[Any]:
        """Start replicas of one reward; returns their handles."""
        actor = ray.remote(Scorer).options(
            num_cpus=settings.cpus, num_gpus=settings.gpus, max_restarts=RESTARTS, max_task_retries=-1
        )
        return [actor.remote(spec) for _ in range(settings.replicas)]

    def add_reference(self, settings: ReferenceFleet, spec: ReferenceSpec) -> None:
        """Start the frozen model's replicas."""
        actor = ray.remote(Reference).options(
            num_cpus=0, num_gpus=settings.gpus, max_restarts=RESTARTS, max_task_retries=-1
        )
        self.reference += [actor.remote(spec) for _ in range(settings.replicas)]

    def add_embedders(self, replicas: int, gpus: float, spec: EmbedderSpec) -> None:
        """Start the sentence embedder's replicas."""
        actor = ray.remote(Embedder).options(num_cpus=0, num_gpus=gpus, max_restarts=RESTARTS, max_task_retries=-1)
        self.embedder += [actor.remote(spec) for _ in range(replicas)]

    def add_channel(self, slots: int) -> Any:
        """A channel for one learner."""
        channel = ray.remote(Channel).options(num_cpus=0, max_concurrency=1000).remote(slots)
        self.others.append(channel)
        return channel

    def trainer(self) -> Any:
        """The actor from which all learners' Ray Train runs are started."""
        if self._trainer is None:
            self._trainer = ray.remote(Trainer).options(num_cpus=0, max_concurrency=1000).remote()
            self.others.append(self._trainer)
        return self._trainer

    async def ready(self) -> None:
        """Wait until every engine, reward, reference and embedder is loaded. Raises what kept one from loading."""
        waits = [g.start.remote() for g in self.generators]
        waits += [one.ready.remote() for one in [*self.scorer, *self.judge, *self.reference, *self.embedder]]
        await gather(*waits)

    def close(self) -> None:
        """Stop every actor; an engine gets a moment to end its own processes."""
        with contextlib.suppress(RayError):
            closing = [g.close.options(max_task_retries=0).remote() for g in self.generators]
            ray.wait(closing, num_returns=len(closing), timeout=5)
        beside = [*self.scorer, *self.judge, *self.reference, *self.embedder, *self.others]
        for handle in [*self.generators, *beside, self.store]:
            with contextlib.suppress(RayError):
                ray.kill(handle)


def start_fleet(keep: int) -> Fleet:
    """A fleet with nothing but its policy store, which holds the newest `keep` versions of every policy."""
    name = f"policy-store-{uuid.uuid4().hex}"
    store = ray.remote(PolicyStore).options(name=name, num_cpus=0, max_concurrency=1000).remote(keep)
    return Fleet(store=store, store_name=name)


def start_learner(fleet: Fleet, spec: LearnerSpec, channel: Any) -> "asyncio.Future[None]":
    """Run a learner beside the event loop; the future ends when the learner does, with a RunError where it failed.

    Not in a thread of this process: one that still calls Ray while Ray shuts down here would end the process at once.
    """
    learner = asyncio.ensure_future(ask(fleet.trainer().run.remote(spec, channel, fleet.store)))
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
    """Our own error inside a Ray error, or a RunError that says what it was."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, RayError):
        return unwrap(cause)
    if isinstance(cause, PlumblineError):
        return cause
    return RunError(in_one_line(cause if isinstance(cause, Exception) else error))


def stop_ray() -> None:
    """Leave the cluster; a local one ends with all its processes."""
    ray.shutdown()
