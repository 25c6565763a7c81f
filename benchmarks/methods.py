"""The table of all methods and baselines in docs/results.md: one run a config and seed, in the miniature world.

    python benchmarks/methods.py [--seeds 0 1 2] [--configs quickstart baselines ablations] [--out runs/methods]

Every run is a shipped config in a world of its own seed. Finished runs are read, not run again. Prints Markdown.
"""

import argparse
from pathlib import Path
from typing import Any

from worlds import comparison, events, interval, optional, run, table


def row(seed: int, figures: dict[str, Any]) -> list[str]:
    return [
        str(seed),
        figures["policy"],
        interval(figures["reward"]),
        f"{figures['PPL']:.3f}",
        f"{figures['BLEU']:.3f}",
        f"{figures['tokens']:.1f}",
        optional(figures, "win rate"),
    ]


def shares(directory: Path) -> str:
    """The pool's last line of a run: who had it, and how long anybody waited."""
    last = events(directory, "pool")[-1]
    told = ", ".join(f"{name} {share:.0%}" for name, share in last["shares"].items())
    waits = ", ".join(f"{name} {wait:.1f} s" for name, wait in last["longest_waits"].items())
    return f"- {directory.name}: tokens {told}; longest wait {waits}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--configs", nargs="+", default=["quickstart", "baselines", "ablations"])
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    options = parser.parse_args()
    compared, pools = [], []
    for seed in options.seeds:
        seen: set[str] = set()
        for config in options.configs:
            directory = run(options.out, config, seed)
            for figures in comparison(directory):
                if figures["policy"] not in seen:  # π0 is in every run
                    seen.add(figures["policy"])
                    compared.append(row(seed, figures))
            pools.append(shares(directory))
    head = ["seed", "policy", "true reward [95 %]", "PPL", "BLEU", "tokens", "win rate against π0"]
    print("\n".join([table(head, compared), "", *pools]))


if __name__ == "__main__":
    main()
