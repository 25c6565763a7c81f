"""A learner: a Ray Train run whose workers pull parts until their channel closes.

Ray Train places and restarts the workers; `actors.learning.worker` is what each does.
"""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import OutOfMemoryError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

from actors.channel import Box, Lease
from actors.desk import Question
from actors.learning.lean import LeanTrainer, NamesPlaces, free_places
from actors.learning.meeting import HeldPort
from actors.learning.worker import LearnerSpec, train
from actors.lost import GONE, who_was_lost
from actors.weights import BOXES_KEPT
from plumbline.config.section import planned
from plumbline.errors import LostError, PlumblineError, RunError, in_one_line
from plumbline.records import Publication, Sample
from plumbline.runs.policies import read_files


def _get(refs: Any) -> Any:
    """What `ray.get` gives; raises LostError where who was asked has died."""
    try:
        return ray.get(refs)
    except GONE as error:
        raise LostError(who_was_lost(error)) from None


class RayFeed:
    """The calls of a channel, a policy store and a desk (where there is one), made blocking, from inside a worker.
    They raise LostError where that has died.

    A lease and a question that were asked for stay under way until they are there: both are waited for at once.
    """

    def __init__(self, channel: Any, store: Any, desk: Any = None) -> None:
        self._channel, self._store, self._desk = channel, store, desk
        self._boxes: deque[Box] = deque(maxlen=BOXES_KEPT)  # what is in them is there as long as this process holds it
        self._leasing: Any = None
        self._taking: Any = None

    def acknowledged(self) -> int:
        return _get(self._channel.acknowledged.remote())

    def attach(self, holder: str, done: int) -> None:
        calls = [self._channel.attach.remote(holder, done)]
        _get([*calls, self._desk.attach.remote(holder)] if self._desk else calls)

    def lease(self, holder: str) -> Lease | Question | None:
        self._leasing = self._leasing or self._channel.lease.remote(holder)
        while True:
            ready, _ = ray.wait([self._leasing, *self._next_question(holder)])
            if self._leasing in ready:
                lease: Any = _get(self._leasing)
                self._leasing = None
                return lease
            if question := self._taken():
                return question

    def question(self, holder: str) -> Question | None:
        asked = self._next_question(holder)
        return self._taken() if asked and ray.wait(asked, timeout=0)[0] else None

    def answer(self, number: int, holder: str, answer: Any, counts: Mapping[str, int]) -> None:
        if self._desk:
            _get(self._desk.answer.remote(number, holder, answer, counts))

    def close(self, holder: str) -> None:
        if self._desk:
            _get(self._desk.close.remote(holder))

    def _next_question(self, holder: str) -> list[Any]:
        """The call that takes it; none where nothing can be asked."""
        if self._desk and self._taking is None:
            self._taking = self._desk.take.remote(holder)
        return [self._taking] if self._desk else []

    def _taken(self) -> Question | None:
        question: Any = _get(self._taking)
        self._taking = None
        if question is None:  # another holder is asked now
            self._desk = None
        return question

    def peek(self, step: int) -> Box:
        return _get(self._channel.peek.remote(step))

    def read(self, box: Box) -> list[Sample]:
        return _get(box.ref)

    def ack(self, step: int, holder: str) -> None:
        _get(self._channel.ack.remote(step, holder))

    def publish(self, publication: Publication) -> None:
        box = None
        if publication.directory and len([node for node in ray.nodes() if node["Alive"]]) > 1:
            box = Box(ref=ray.put(read_files(Path(publication.directory))))
            self._boxes.append(box)
        _get(self._store.publish.remote(publication, box))

    def fail(self, policy: str, error: PlumblineError) -> None:
        calls = [self._store.fail.remote(policy, error), self._channel.fail.remote(error)]
        _get([*calls, self._desk.fail.remote(error)] if self._desk else calls)


def worker_loop(config: dict[str, Any]) -> str | None:
    """The `train_loop_per_worker` of Ray Train. Returns which of its feed's processes it lost, where it ended by that:
    Ray Train would start a worker that raises again, with the same feed."""
    context = ray.train.get_context()
    feed = RayFeed(config["channel"], config["store"], config["desk"])
    try:
        train(config["spec"], feed, context.get_world_rank(), context.get_world_size())
    except LostError as error:
        return str(error)


class Trainer:
    """Where the Ray Train runs of all learners of a fleet are started and waited for, each in a thread.

    Args:
        label: what the fleet's names begin with.
    """

    def __init__(self, label: str) -> None:
        self._label = label

    def ready(self) -> None:
        """Returns once this process has started."""

    def run(self, spec: LearnerSpec, channel: Any, store: Any, desk: Any = None) -> None:
        """Train until the channel closes. Blocks.

        Raises:
            LostError: its channel, its desk or the store died.
            RunError: a worker failed, or died more often than `max_failures`.
        """
        place = f"{self._label}/learner-{spec.section.name}"
        free_places(place)  # of one whose controller, or whose trainer, died
        try:
            lost = fit(spec, channel, store, desk, place)
        except TrainingFailedError as error:
            raise ended(spec.section.name, error) from None
        if lost:
            raise LostError(lost)


def ended(name: str, error: TrainingFailedError) -> RunError | LostError:
    """Why the learner of `name` ended. Where the run's controller met a worker that Ray ended for want of memory, Ray
    Train did not try again: that is for who lost it."""
    controller = getattr(error, "controller_failure", None)
    workers = getattr(error, "worker_failures", {}).values()
    found = [controller, *(getattr(one, "health_check_failure", one) for one in workers)]
    short = next((one for one in found if isinstance(one, OutOfMemoryError)), None)
    if short is None:
        return RunError(f"the learner of {name} ended: {in_one_line(error)}")
    kind = LostError if short is controller else RunError
    return kind(f"the learner of {name} ended: {who_was_lost(short)}")


def fit(spec: LearnerSpec, channel: Any, store: Any, desk: Any = None, place: str = "learner") -> str | None:
    """The run itself, on resources that are reserved under the name of `place`; see `worker_loop`.

    Raises:
        TrainingFailedError: a worker failed too often.
    """
    learner = spec.section.learner
    gpus = planned(learner.gpus)
    resources: dict[str, float] = {"CPU": planned(learner.cpus), **learner.resources}
    if gpus:
        resources["GPU"] = gpus
    trainer = LeanTrainer(
        worker_loop,
        train_loop_config={"spec": spec, "channel": channel, "store": store, "desk": desk},
        # A worker may wait for its next part as long as generation takes.
        torch_config=HeldPort(backend="nccl" if spec.device == "cuda" else "gloo", timeout_s=86_400),
        scaling_config=ScalingConfig(
            num_workers=learner.workers,  # a pair are bounds: as many as the cluster has room for
            use_gpu=gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=spec.section.name,
            storage_path=str(spec.run_dir / ".train"),
            failure_config=FailureConfig(max_failures=learner.max_failures),
            callbacks=[NamesPlaces(place)],  # pyright: ignore[reportArgumentType]  # Ray Train calls those of workers too
        ),
    )
    return trainer.fit().return_value
