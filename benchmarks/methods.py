"""The table of all methods and baselines in docs/results.md: one run a config and seed, in the miniature world.

    python benchmarks/methods.py [--seeds 0 1 2] [--configs quickstart baselines ablations] [--out runs/methods]

Every run is a shipped config in a world of its own seed. All runs of a seed answer the same held-out prompts by the
same seeds, so that policies of different runs are compared prompt by prompt. Finished runs are read, not run again.
Prints Markdown.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from worlds import comparison, events, interval, rewards, run, table

from plumbline.methods.evaluation import paired_interval, reward_win_rate


def row(seed: int, figures: dict[str, Any], rewards: dict[str, list[float]]) -> list[str]:
    name = figures["policy"]
    against = [""] * 2
    if name != "sft" and "sft" in rewards:
        pairs = [pair for pair in zip(rewards["sft"], rewards[name], strict=True) if not any(map(math.isnan, pair))]
        theirs, ours = ([pair[i] for pair in pairs] for i in (0, 1))
        better = paired_interval(theirs, ours)
        against = [
            f"{better.mean:+.3f} [{better.low:+.3f}, {better.high:+.3f}]",
            f"{reward_win_rate(ours, theirs):.3f}",
        ]
    return [
        str(seed),
        name,
        interval(figures["reward"]),
        *against,
        f"{figures['PPL']:.3f}",
        f"{figures['BLEU']:.3f}",
        f"{figures['tokens']:.1f}",
    ]


def shares(directory: Path) -> str:
    """The pool's last line of a run: who had it, and how long anybody went without."""
    last = events(directory, "pool")[-1]
    told = ", ".join(f"{name} {share:.0%}" for name, share in last["shares"].items())
    waits = ", ".join(f"{name} {wait:.1f} s" for name, wait in last["longest_waits"].items())
    return f"- {directory.name}: tokens {told}; longest wait {waits}"


def rows_of(seed: int, directories: Sequence[Path]) -> list[list[str]]:
    """Every policy of a seed's runs, π0 once."""
    known: dict[str, list[float]] = {}
    figures: dict[str, dict[str, Any]] = {}
    for directory in directories:
        known |= rewards(directory)
        figures |= {one["policy"]: one for one in comparison(directory)}
    return [row(seed, one, known) for one in figures.values()]


def means(runs: Mapping[int, Sequence[Path]]) -> list[list[str]]:
    """Every policy's figures as means over the seeds, and the lowest and highest reward of a seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for directories in runs.values():
        own = {one["policy"]: one for directory in directories for one in comparison(directory)}
        for name, figures in own.items():
            found.setdefault(name, []).append(figures)
    rows = []
    for name, of_seeds in found.items():
        true = [figures["reward"]["mean"] for figures in of_seeds]
        others = (f"{fmean(figures[key] for figures in of_seeds):.3f}" for key in ("PPL", "BLEU", "tokens"))
        rows.append([name, f"{fmean(true):+.3f} ({min(true):+.3f} to {max(true):+.3f})", *others])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--configs", nargs="+", default=["quickstart", "baselines", "ablations"])
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    options = parser.parse_args()
    runs = {seed: [run(options.out, config, seed) for config in options.configs] for seed in options.seeds}
    head = ["seed", "policy", "true reward [95 %]", "above sft [95 %]", "win rate against sft", "PPL", "BLEU", "tokens"]
    print(table(head, [row for seed, directories in runs.items() for row in rows_of(seed, directories)]), "\n")
    print(table(["policy", "true reward, mean of seeds", "PPL", "BLEU", "tokens"], means(runs)), "\n")
    print("\n".join(shares(directory) for directories in runs.values() for directory in directories))


if __name__ == "__main__":
    main()
