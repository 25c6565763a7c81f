"""Which of a run's processes died, in one line, where Ray says it in ten."""

import re

from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayActorError, RayError

from plumbline.errors import in_one_line

GONE = (RayActorError, OutOfMemoryError)
"""What Ray raises where who was asked has died; ended for want of memory is a kind of its own to it."""


def who_was_lost(error: RayError) -> str:
    """Which process died, as Ray's own lines of it say, and its reason where they do not."""
    told = dict(re.findall(r"^\t(\w+): (.*)$", str(error), re.MULTILINE))
    if isinstance(error, ActorDiedError) and (who := told.get("name") or told.get("class_name")):
        return f"the process {who} died"
    if isinstance(error, ActorUnavailableError):  # of one that Ray starts anew, it tells no name
        return "a process that holds the run together died, and is started anew"
    if isinstance(error, OutOfMemoryError):
        ended = ", ".join(dict.fromkeys(re.findall(r"task name=([^:,]+)", str(error)))) or "a process"
        used = re.search(r"was (\S+) used / (\S+) limit", str(error))
        full = f", of which {used[1]} of {used[2]} were in use" if used else ""
        return (
            f"Ray ended {ended} for want of memory{full}; fewer pipelines side by side or a smaller "
            "`learner.micro_tokens` take less"
        )
    return in_one_line(error)
