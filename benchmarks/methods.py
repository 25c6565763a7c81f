"""The table of all methods and baselines in docs/results.md: one run a config and seed, in the miniature world.

    python benchmarks/methods.py [--seeds 0 1 2] [--configs quickstart baselines ablations] [--out runs/methods]

Every run is a shipped config in a world of its own seed, through the command line and actors of any other. Finished
runs are read, not run again. Prints Markdown.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from plumbline.config_file import load_config


def run(out: Path, seed: int, name: str) -> dict[str, Any]:
    """One run's comparison, or what it left."""
    world, directory = out / f"world-{seed}", out / f"{name}-{seed}"
    if not (directory / "evaluation.json").exists():
        if not (world / "world.json").exists():
            make = [sys.executable, "-m", "plumbline.miniature", str(world), "--seed", str(seed)]
            subprocess.run(make, check=True, stdout=2)
        config = load_config(f"configs/{name}.yaml")
        sets = {
            "model.path": world / "model",
            "data.train.path": world / "prompts_train.jsonl",
            "data.heldout.path": world / "prompts_heldout.jsonl",
            "seed": seed,
            "evaluation.prompts": 512,
        }
        if config.embedder:
            sets["embedder.path"] = world / "embedder"
        for i, section in enumerate(config.pipelines):
            if getattr(section, "pairs", None):
                sets[f"pipelines.{i}.pairs.path"] = world / "preferences.jsonl"
        command = [sys.executable, "-m", "plumbline.cli", "run", f"configs/{name}.yaml", "--run-dir", str(directory)]
        arguments = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
        subprocess.run([*command, *arguments], check=True, stdout=2)
    return json.loads((directory / "evaluation.json").read_text())


def interval(value: dict[str, float]) -> str:
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def row(seed: int, figures: dict[str, Any]) -> str:
    cells = [
        str(seed),
        figures["policy"],
        interval(figures["reward"]),
        f"{figures['PPL']:.3f}",
        f"{figures['BLEU']:.3f}",
        f"{figures['tokens']:.1f}",
        f"{figures['win rate']:.3f}" if "win rate" in figures else "",
    ]
    return "| " + " | ".join(cells) + " |"


def shares(directory: Path) -> str:
    """The pool's last line of a run: who had it, and how long anybody waited."""
    lines = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["pipeline"] == "pool"][-1]
    told = ", ".join(f"{name} {share:.0%}" for name, share in last["shares"].items())
    waits = ", ".join(f"{name} {wait:.1f} s" for name, wait in last["longest_waits"].items())
    return f"- {directory.name}: tokens {told}; longest wait {waits}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--configs", nargs="+", default=["quickstart", "baselines", "ablations"])
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    options = parser.parse_args()
    lines = [
        "| seed | policy | true reward [95 %] | PPL | BLEU | tokens | win rate against π0 |",
        "|---|---|---|---|---|---|---|",
    ]
    pools = []
    for seed in options.seeds:
        seen: set[str] = set()
        for name in options.configs:
            for figures in run(options.out, seed, name)["rows"]:
                if figures["policy"] not in seen:  # π0 is in every run
                    seen.add(figures["policy"])
                    lines.append(row(seed, figures))
            pools.append(shares(options.out / f"{name}-{seed}"))
    print("\n".join([*lines, "", *pools]))


if __name__ == "__main__":
    main()
