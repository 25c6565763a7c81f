"""``python -m plumbline.miniature DIR --seed N``: builds a world and prints what it is like."""
# ruff: noqa: T201 -- this is a command line

import argparse
import sys
from pathlib import Path

from plumbline.errors import UserError
from plumbline.miniature.build import build_world


def main() -> int:
    """Exit code 0, or 2 with one line on stderr for wrong use."""
    parser = argparse.ArgumentParser(prog="python -m plumbline.miniature", description=__doc__)
    parser.add_argument("directory", type=Path, help="where the world goes: new, empty, or an earlier world")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    last = ""

    def progress(stage: str, share: float) -> None:
        nonlocal last
        line = f"{stage}: {int(share * 10) * 10}%"
        if line != last:
            print(line, file=sys.stderr)
            last = line

    try:
        world = build_world(arguments.directory, arguments.seed, progress=progress)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{world.directory}: seed {world.seed}")
    for name, value in world.figures.items():
        print(f"  {name:24} {value:7.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
