"""Python finds our packages where this code lies, whatever the working directory holds: a user's own `serve.py` or
`actors/` has the name of one of ours, and Ray puts a driver's working directory first in its workers' `sys.path`.

Called by the command line, and by Ray's workers before they import anything of ours (`actors.cluster.start_ray`).
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

HOME = str(Path(__file__).resolve().parents[1])
"""The directory of our packages: a checkout, or where a wheel was installed."""

PACKAGES = ("plumbline", "actors", "pipelines", "serve", "cli")


def ours_first(path: Sequence[str]) -> list[str]:
    """An import path that has `HOME`, and before it nothing of our names; what would stand there moves right behind it.

    `HOME` stays where it is, or comes last: beside an installed package are others, and none may come before Python's
    own. A folder without `__init__.py` is no package while `HOME`, anywhere behind it, has one of that name.
    """
    home, places = os.path.realpath(HOME), [_place(entry) for entry in path]
    if not os.path.isdir(home):  # a worker of another machine may have our packages elsewhere
        return list(path)
    at = places.index(home) if home in places else len(path)
    shadows = [entry for entry in path[:at] if any(_has(entry, name) for name in PACKAGES)]
    return [*(entry for entry in path[:at] if entry not in shadows), HOME, *shadows, *path[at + 1 :]]


def _place(entry: str) -> str:
    """Where an entry is; a relative one is nowhere once the working directory was removed."""
    try:
        return os.path.realpath(entry)
    except OSError:
        return entry


def _has(entry: str, name: str) -> bool:
    """Whether a path's entry, a directory or an archive, has a module or a package of this name."""
    spec = PathFinder.find_spec(name, [entry])
    return spec is not None and spec.loader is not None


def worker_hook() -> Callable[[], None]:
    """What a Ray worker calls as it starts: its path is put right when one of our packages is first imported.

    Not before, for Ray adds the driver's working directory to it with the worker's first task.
    """

    class OursFirst:
        """A finder that finds nothing: the path is in order when the finders behind it look."""

        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name in PACKAGES:
                sys.path[:] = ours_first(sys.path)

    return lambda: sys.meta_path.insert(0, OursFirst())
