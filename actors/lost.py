"""Which of a run's processes died, in one line, where Ray says it in ten."""

import re

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from plumbline.errors import in_one_line


def who_was_lost(error: RayError) -> str:
    """Which process died, as Ray's own lines of it say, and its reason where they do not."""
    told = dict(re.findall(r"^\t(\w+): (.*)$", str(error), re.MULTILINE))
    if isinstance(error, ActorDiedError) and (who := told.get("name") or told.get("class_name")):
        return f"the process {who} died"
    if isinstance(error, ActorUnavailableError):  # of one that Ray starts anew, it tells no name
        return "a process that holds the run together died, and is started anew"
    return in_one_line(error)
