"""A dead process is called what Ray's dashboard calls it."""

from ray.core.generated.common_pb2 import ActorDiedErrorContext  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, OutOfMemoryError

from actors.lost import who_was_lost
from actors.spawn import unwrap
from plumbline.errors import LostError


def context(**told: object) -> ActorDiedErrorContext:
    return ActorDiedErrorContext(actor_id=b"0" * 16, class_name="Channel", error_message="worker exit", **told)


def test_it_is_named() -> None:
    assert who_was_lost(ActorDiedError(context(name="run/channel-ple-0", pid=7))) == (
        "the process run/channel-ple-0 died"
    )


def test_without_a_name_it_is_what_it_does() -> None:
    assert who_was_lost(ActorDiedError(context())) == "the process Channel died"


def test_one_that_is_started_anew_has_no_name_to_tell() -> None:
    told = who_was_lost(ActorUnavailableError("connection reset", None))
    assert told == "a process that holds the run together died, and is started anew"


def test_what_else_there_is_is_told_as_ray_does() -> None:
    assert who_was_lost(ObjectLostError("ab", None, "")).startswith("ObjectLostError: ")


def test_one_that_was_ended_for_want_of_memory_is_lost_too_and_says_what_to_do() -> None:
    """As Ray 2.56 writes it, in forty lines."""
    told = OutOfMemoryError(
        "2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.1, ID: 76) was "
        "22.52GB used / 23.54GB limit (0.956832)\nOOM kill reason: …\nSelected to kill: (Actor(b2): job ID=01, task "
        "name=run/embedder:Embedder.__init__, pid=7), (Actor(b3): task name=run/scorer-0:Scorer.score, pid=8)\n"
    )
    lost = unwrap(told)
    assert isinstance(lost, LostError)
    assert str(lost) == (
        "Ray ended run/embedder, run/scorer-0 for want of memory, of which 22.52GB of 23.54GB were in use; fewer "
        "pipelines side by side or a smaller `learner.micro_tokens` take less"
    )
