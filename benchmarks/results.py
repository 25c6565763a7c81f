"""The tables of docs/results.md: PLE and its two ablations in the miniature world, several seeds, and staleness.

    python benchmarks/results.py [--seeds 0 1 2] [--variants ple no-rank no-weighted-sft] [--out runs/results]

Every run is `configs/ple.yaml` in a world of its own seed, through the command line and actors of any other.
Finished runs are read, not run again. Prints Markdown.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

VARIANTS: dict[str, list[str]] = {
    "ple": [],
    "no-rank": ["pipelines.0.rank_weight=0"],
    "no-weighted-sft": ["pipelines.0.sft_weight=0"],
    "staleness-0": ["pipelines.0.max_staleness=0"],
}


def run(out: Path, seed: int, variant: str) -> dict[str, Any]:
    """One run, or what it left."""
    world, directory = out / f"world-{seed}", out / f"{variant}-{seed}"
    if not (directory / "evaluation.json").exists():
        if not (world / "world.json").exists():
            make = [sys.executable, "-m", "plumbline.miniature", str(world), "--seed", str(seed)]
            subprocess.run(make, check=True, stdout=2)
        paths = {
            "model.path": world / "model",
            "data.train.path": world / "prompts_train.jsonl",
            "data.heldout.path": world / "prompts_heldout.jsonl",
            "seed": seed,
            "evaluation.prompts": 512,
        }
        sets = [f"{key}={value}" for key, value in paths.items()] + VARIANTS[variant]
        command = [sys.executable, "-m", "plumbline.cli", "run", "configs/ple.yaml", "--run-dir", str(directory)]
        subprocess.run([*command, *(part for one in sets for part in ("--set", one))], check=True, stdout=2)
    return json.loads((directory / "evaluation.json").read_text())


def interval(value: dict[str, float]) -> str:
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def row(seed: int, variant: str, figures: dict[str, Any]) -> str:
    cells = [
        str(seed),
        variant,
        interval(figures["reward"]),
        f"{figures['guided']['mean']:+.3f}",
        interval(figures["gap"]),
        f"{figures['PPL']:.3f}",
        f"{figures['BLEU']:.3f}",
        f"{figures['tokens']:.1f}",
        f"{figures.get('win rate', float('nan')):.3f}" if "win rate" in figures else "",
    ]
    return "| " + " | ".join(cells) + " |"


def idle(directory: Path) -> str:
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    events = [event for event in events if event["pipeline"] == "ple"][2:]
    mean = {k: statistics.fmean(e[k] for e in events) for k in ("seconds", "generator_idle", "learner_idle")}
    reward = statistics.fmean(e["reward_plain"] for e in events[-4:])
    return (
        f"| {directory.name} | {mean['seconds']:.2f} | {mean['generator_idle']:.0%} | {mean['learner_idle']:.0%} "
        f"| {max(e['staleness'] for e in events):.0f} | {reward:+.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["ple", "no-rank", "no-weighted-sft"])
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    options = parser.parse_args()
    lines = [
        "| seed | policy | reward [95 %] | guided | gap [95 %] | PPL | BLEU | tokens | win rate |",
        "|" + "---|" * 9,
    ]
    for seed in options.seeds:
        for i, variant in enumerate(options.variants):
            before, after = run(options.out.absolute(), seed, variant)["rows"]
            if i == 0:
                lines.append(row(seed, "before (π0)", before))
            lines.append(row(seed, variant, after))
    print("\n".join(lines), "\n")
    print(
        "| run | s/step | generator idle | learner idle | staleness | plain reward, last 4 steps |\n" + "|" + "---|" * 6
    )
    for seed in options.seeds:
        for variant in options.variants:
            print(idle(options.out / f"{variant}-{seed}"))


if __name__ == "__main__":
    main()
