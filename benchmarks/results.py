"""The tables of PLE in docs/results.md: the method and its two ablations in the miniature world, and staleness.

    python benchmarks/results.py [--seeds 0 1 2] [--variants ple no-rank no-weighted-sft] [--out runs/results]

Every run is `configs/ple.yaml` in a world of its own seed. Finished runs are read, not run again. Prints Markdown.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from worlds import comparison, events, interval, optional, run, table

VARIANTS: dict[str, list[str]] = {
    "ple": [],
    "no-rank": ["pipelines.0.rank_weight=0"],
    "no-weighted-sft": ["pipelines.0.sft_weight=0", "pipelines.0.length_normalize_sft=false"],
    "staleness-0": ["pipelines.0.max_staleness=0"],
}


def row(seed: int, variant: str, figures: dict[str, Any]) -> list[str]:
    return [
        str(seed),
        variant,
        interval(figures["reward"]),
        f"{figures['guided']['mean']:+.3f}",
        interval(figures["gap"]),
        f"{figures['PPL']:.3f}",
        f"{figures['BLEU']:.3f}",
        f"{figures['tokens']:.1f}",
        optional(figures, "win rate"),
    ]


def idle(directory: Path) -> list[str]:
    steps = events(directory, "ple")[2:]
    mean = {k: statistics.fmean(e[k] for e in steps) for k in ("seconds", "generator_idle", "learner_idle")}
    return [
        directory.name,
        f"{mean['seconds']:.2f}",
        f"{mean['generator_idle']:.0%}",
        f"{mean['learner_idle']:.0%}",
        f"{max(e['staleness'] for e in steps):.0f}",
        f"{statistics.fmean(e['reward_plain'] for e in steps[-4:]):+.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["ple", "no-rank", "no-weighted-sft"])
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    options = parser.parse_args()
    compared, idles = [], []
    for seed in options.seeds:
        for i, variant in enumerate(options.variants):
            directory = run(options.out, "ple", seed, VARIANTS[variant], name=variant)
            before, after = comparison(directory)
            if i == 0:
                compared.append(row(seed, "before (π0)", before))
            compared.append(row(seed, variant, after))
            idles.append(idle(directory))
    head = ["seed", "policy", "reward [95 %]", "guided", "gap [95 %]", "PPL", "BLEU", "tokens", "win rate"]
    print(table(head, compared), "\n")
    head = ["run", "s/step", "generator idle", "learner idle", "staleness", "plain reward, last 4 steps"]
    print(table(head, idles))


if __name__ == "__main__":
    main()
