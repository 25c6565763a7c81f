"""PLE, DLMA and Self-Contrast against DPO on true preferences and SFT on true targets, in the miniature world.

    python benchmarks/truth.py [--seeds 0 1 2] [--budget 6m] [--out runs/truth]

`configs/truth.yaml`: 32 updates each. The rates of all five are found by `plumbline tune` with the same budget, in the
world of the first seed; then each seed's world has a run of them side by side. A row's difference is paired by prompt,
over all prompts of all worlds. What is finished is not run again. Prints Markdown.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from worlds import comparison, ending, in_world, interval, rewards, run_config, table, tuned

from plumbline.config.file import load_config
from plumbline.methods.evaluation import paired_interval
from plumbline.tuning.halving import parse_budget

CONFIG = Path("configs/truth.yaml")
TRUE = ("dpo", "sft")
"""Who has what users of the others do not have."""


def differences(seeds: Sequence[Mapping[str, list[float]]], ours: str, theirs: str) -> list[str]:
    """Ours less theirs: over all prompts of all seeds, and of each seed."""
    answered = [
        [pair for pair in zip(one[theirs], one[ours], strict=True) if all(map(math.isfinite, pair))] for one in seeds
    ]
    each = ", ".join(f"{fmean(after - before for before, after in pairs):+.3f}" for pairs in answered)
    before, after = zip(*(pair for pairs in answered for pair in pairs), strict=True)
    all_of_them = paired_interval(before, after)
    stands = "above" if all_of_them.low > 0 else "below" if all_of_them.high < 0 else "not told apart"
    shown = f"{all_of_them.mean:+.3f} [{all_of_them.low:+.3f}, {all_of_them.high:+.3f}]"
    return [f"{ours} − {theirs}", shown, each, stands]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", default="6m")
    parser.add_argument("--out", type=Path, default=Path("runs/truth"))
    options = parser.parse_args()
    out = options.out.absolute()
    tune = out / f"tune-{options.budget}-{options.seeds[0]}"
    with ending("truth"):
        parse_budget(options.budget)
        found = tuned(CONFIG, tune, in_world(CONFIG, out, options.seeds[0]), options.budget)
        runs = [run_config(found, out / f"{tune.name}-of-{seed}", in_world(found, out, seed)) for seed in options.seeds]
    names = [one.name for one in load_config(found).pipelines]
    rates = ", ".join(f"{one.name} {one.learner.lr:g}" for one in load_config(found).pipelines)
    print(f"Rates found in the world of seed {options.seeds[0]}, {options.budget} each: {rates}.\n")
    rows = [
        [str(seed), row["policy"], interval(row["reward"]), *(f"{row[key]:.3f}" for key in ("PPL", "BLEU", "tokens"))]
        for seed, run in zip(options.seeds, runs, strict=True)
        for row in comparison(run)
    ]
    print(table(["seed", "policy", "true reward [95 %]", "PPL", "BLEU", "tokens"], rows), "\n")
    kept = [rewards(run) for run in runs]
    told = [differences(kept, ours, theirs) for ours in names if ours not in TRUE for theirs in TRUE]
    print(table(["difference", "of all worlds [95 %]", "of each", "ours is"], told))


if __name__ == "__main__":
    main()
