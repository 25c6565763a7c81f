"""A learner: a Ray Train run whose workers pull parts until their channel closes.

Ray Train places and restarts the workers; `actors.learning.worker` is what each does.
"""

from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from actors.channel import Box, Lease
from actors.learning.worker import LearnerSpec, train
from plumbline.config.section import planned
from plumbline.errors import PlumblineError, RunError, in_one_line
from plumbline.records import Publication, Sample


class RayFeed:
    """The calls of a channel and a policy store, made blocking, from inside a worker."""

    def __init__(self, channel: Any, store: Any) -> None:
        self._channel, self._store = channel, store

    def attach(self, holder: str, done: int) -> None:
        ray.get(self._channel.attach.remote(holder, done))

    def lease(self, holder: str) -> Lease | None:
        return ray.get(self._channel.lease.remote(holder))

    def peek(self, step: int) -> Box:
        return ray.get(self._channel.peek.remote(step))

    def read(self, box: Box) -> list[Sample]:
        return ray.get(box.ref)

    def ack(self, step: int, holder: str) -> None:
        ray.get(self._channel.ack.remote(step, holder))

    def publish(self, publication: Publication) -> None:
        ray.get(self._store.publish.remote(publication))

    def fail(self, policy: str, error: PlumblineError) -> None:
        ray.get([self._store.fail.remote(policy, error), self._channel.fail.remote(error)])


def worker_loop(config: dict[str, Any]) -> None:
    """The `train_loop_per_worker` of Ray Train."""
    context = ray.train.get_context()
    train(
        config["spec"], RayFeed(config["channel"], config["store"]), context.get_world_rank(), context.get_world_size()
    )


class Trainer:
    """Where the Ray Train runs of all learners of a fleet are started and waited for, each in a thread."""

    def run(self, spec: LearnerSpec, channel: Any, store: Any) -> None:
        """Train until the channel closes. Blocks.

        Raises:
            RunError: a worker failed, or died more often than `max_failures`.
        """
        try:
            fit(spec, channel, store)
        except TrainingFailedError as error:
            raise RunError(f"the learner of {spec.section.name} ended: {in_one_line(error)}") from None


def fit(spec: LearnerSpec, channel: Any, store: Any) -> None:
    """The run itself. Raises TrainingFailedError."""
    learner = spec.section.learner
    gpus = planned(learner.gpus)
    resources: dict[str, float] = {"CPU": planned(learner.cpus), **learner.resources}
    if gpus:
        resources["GPU"] = gpus
    TorchTrainer(
        worker_loop,
        train_loop_config={"spec": spec, "channel": channel, "store": store},
        # A worker may wait for its next part as long as generation takes.
        torch_config=TorchConfig(backend="nccl" if spec.device == "cuda" else "gloo", timeout_s=86_400),
        scaling_config=ScalingConfig(
            num_workers=learner.workers,  # a pair are bounds: as many as the cluster has room for
            use_gpu=gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=spec.section.name,
            storage_path=str(spec.run_dir / ".train"),
            failure_config=FailureConfig(max_failures=learner.max_failures),
        ),
    ).fit()
