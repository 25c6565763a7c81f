"""Python finds our packages where this code lies, whatever the working directory holds: a user's own `serve.py` or
`actors/` has the name of one of ours, and Ray puts a driver's working directory first in its workers' `sys.path`.

Called by the command line, by Ray's workers before they import anything of ours (`actors.spawn.start_ray`), and by the
doctor, which imports a reward as they will.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HOME = str(Path(__file__).resolve().parents[1])
"""The directory of our packages: a checkout, or where a wheel was installed."""

PACKAGES = ("plumbline", "actors", "pipelines", "serve", "cli")


def ours_first(path: Sequence[str]) -> list[str]:
    """An import path on which nothing of our names comes before `HOME`; what would moves right behind it.

    `HOME` itself stays where it is: beside an installed package are others, and none may come before Python's own.
    """
    home, places = os.path.realpath(HOME), [os.path.realpath(entry) for entry in path]
    at = places.index(home) if home in places else len(path)
    shadows = [entry for entry in path[:at] if _has_our_names(entry)]
    if not shadows or not os.path.isdir(home):  # a worker of another machine may have our packages elsewhere
        return list(path)
    return [*(entry for entry in path[:at] if entry not in shadows), HOME, *shadows, *path[at + 1 :]]


def _has_our_names(directory: str) -> bool:
    """A directory without `__init__.py` is no package while there is one elsewhere on the path."""
    files = [file for name in PACKAGES for file in (f"{name}.py", os.path.join(name, "__init__.py"))]
    return any(os.path.isfile(os.path.join(directory, file)) for file in files)


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


def with_working_directory(path: Sequence[str]) -> list[str]:
    """The import path on which a reward is looked up: modules of the working directory are found, ours not replaced."""
    return ours_first(path if os.getcwd() in path else [os.getcwd(), *path])
