"""A dead process is called what Ray's dashboard calls it."""

from ray.core.generated.common_pb2 import ActorDiedErrorContext  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError

from actors.lost import who_was_lost


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
