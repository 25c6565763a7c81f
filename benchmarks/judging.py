"""How right the models judge themselves, by the miniature world's ground truth: two tables of docs/results.md.

    python benchmarks/judging.py [--seeds 0] [--out runs/methods]

DLMA: how often the sign of the margin R is that of the true preference, by quantile of |R| (ties of the truth left
out), in the pairs of `configs/quickstart.yaml`. Self-Contrast: the share of negatives that are truly worse than their
target, and the policy's reward, over the share a of samples that they are drawn from (`configs/keep.yaml`). Finished
runs are read, not run again. Prints Markdown.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from worlds import comparison, events, interval, run, table

QUANTILES = 5


def pairs(directory: Path, name: str) -> list[dict[str, Any]]:
    """All rows of a pipeline's parts."""
    parts = sorted((directory / "pairs" / name).glob("step-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def agreement(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A row a quantile of |R|: its range, its pairs, and how many agree with the truth."""
    rows = [row for row in rows if row["chosen_reward"] != row["rejected_reward"]]
    rows = sorted(rows, key=lambda row: abs(row["margin"]))
    found = []
    for i in range(QUANTILES):
        part = rows[len(rows) * i // QUANTILES : len(rows) * (i + 1) // QUANTILES]
        right = [(row["margin"] > 0) == (row["chosen_reward"] > row["rejected_reward"]) for row in part]
        sizes = [abs(row["margin"]) for row in part]
        found.append([f"{sizes[0]:.2f} to {sizes[-1]:.2f}", str(len(part)), f"{statistics.fmean(right):.1%}"])
    return found


def kept(directory: Path) -> list[list[str]]:
    """A row a value of a: data accuracy over all parts, and the policy's reward."""
    found = []
    for figures in comparison(directory):
        name = figures["policy"]
        rows = pairs(directory, name)
        right = f"{statistics.fmean(row['rejected_reward'] < row['chosen_reward'] for row in rows):.1%}" if rows else ""
        accuracy = events(directory, name)[-1]["accuracy"] if rows else None
        found.append([name, right, interval(figures["reward"]), "" if accuracy is None else f"{accuracy:.1%}"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    options = parser.parse_args()
    judged, filtered = [], []
    for seed in options.seeds:
        judged += [[str(seed), *row] for row in agreement(pairs(run(options.out, "quickstart", seed), "dlma"))]
        filtered += [[str(seed), *row] for row in kept(run(options.out, "keep", seed))]
    print(table(["seed", "size of R", "pairs", "sign of R is the truth's"], judged), "\n")
    print(table(["seed", "policy", "data accuracy", "true reward [95 %]", "DPO accuracy, last step"], filtered))


if __name__ == "__main__":
    main()
