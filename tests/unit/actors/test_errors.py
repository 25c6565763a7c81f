"""The one line of errors that libraries raise, here and in other processes."""

import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import BaseModel, model_validator
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.spawn import unwrap
from plumbline.errors import in_one_line

LONG = "max_model_len (268) is greater than the derived max_model_len (256)"


class Engine(BaseModel):
    length: int
    name: str = ""

    @model_validator(mode="after")
    def _fits(self) -> "Engine":
        if self.length > 256:
            raise ValueError(LONG)
        return self


class NotPickled(ValueError):
    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle")


def raised(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError


def remote(call: Callable[[], object]) -> Exception:
    """The error as Ray hands it over from another process."""
    try:
        call()
    except Exception as error:
        failed = RayTaskError("start", traceback.format_exc(), error, proctitle="ray::start", pid=1, ip="127.0.0.1")
        return pickle.loads(pickle.dumps(failed)).as_instanceof_cause()
    raise AssertionError


def not_pickled() -> None:
    raise NotPickled(f"{LONG}\nread more at https://somewhere")


def after_another() -> None:
    try:
        Engine(length=268)
    except ValueError as error:
        raise RuntimeError("the engine did not start\nSee above.") from error


def other_shapes() -> None:
    torch.nn.Linear(2, 2).load_state_dict({"weight": torch.zeros(3, 3), "bias": torch.zeros(2)})


DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: Generator\n\tactor_id: 1a\n\tpid: 7\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"
)
CASES = [
    (lambda: Engine(length=268), f"ValidationError: {LONG}"),
    (lambda: Engine.model_validate({}), "ValidationError: length: Field required"),
    (lambda: Engine.model_validate({"length": "q", "name": 1}), "ValidationError: length: Input should be a valid"),
    (not_pickled, f"NotPickled: {LONG}"),
    (after_another, "RuntimeError: the engine did not start"),
    (other_shapes, "RuntimeError: Error(s) in loading state_dict for Linear: size mismatch for weight:"),
    (lambda: [][1], "IndexError: list index out of range"),
    (lambda: next(iter(())), "StopIteration: "),
]


@pytest.mark.parametrize(("call", "line"), CASES)
def test_what_is_wrong_is_in_the_line(call: Callable[[], object], line: str) -> None:
    here = in_one_line(raised(call))
    assert here.startswith(line) and "\n" not in here and "further information" not in here


@pytest.mark.parametrize(("call", "line"), CASES)
def test_another_processs_error_is_told_as_if_it_were_here(call: Callable[[], object], line: str) -> None:
    error = remote(call)
    assert in_one_line(error).startswith(line)
    assert isinstance(error, RayError) and str(unwrap(error)).startswith(line)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RayActorError(error_msg=DIED), f"RayActorError: {DIED.splitlines()[-1]}"),
        (OSError("cannot connect to the hub\nCheck your internet connection."), "OSError: cannot connect to the hub"),
        (RuntimeError("CUDA error: out of memory\nCompile with DSA.\n"), "RuntimeError: CUDA error: out of memory"),
        (ValueError(), "ValueError: "),
    ],
)
def test_of_several_lines_the_one_that_says_most(error: Exception, line: str) -> None:
    assert in_one_line(error) == line
