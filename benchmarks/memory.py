"""Resident memory of the pipeline process and use of the object store over 200 small steps: both should stay flat.

    python benchmarks/memory.py [--steps 200] [--world runs/world] [--run-dir runs/memory]

A run of `configs/ple.yaml` with eight prompts a step; the figures are those of its own `events.jsonl`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from worlds import events, make_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--world", type=Path, default=Path("runs/world"))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/memory"))
    options = parser.parse_args()
    if not (options.run_dir / "events.jsonl").exists():
        make_world(options.world, seed=0)
        sets = [
            f"pipelines.0.steps={options.steps}",
            "pipelines.0.batch_size=8",
            "pipelines.0.learner.lr=1e-5",
            "evaluation.prompts=8",
            f"model.path={options.world.absolute() / 'model'}",
            f"data.train.path={options.world.absolute() / 'prompts_train.jsonl'}",
            f"data.heldout.path={options.world.absolute() / 'prompts_heldout.jsonl'}",
        ]
        command = [sys.executable, "-m", "cli", "run", "configs/ple.yaml"]
        command += ["--run-dir", str(options.run_dir), *(part for one in sets for part in ("--set", one))]
        subprocess.run(command, check=True, stdout=2)
    steps = events(options.run_dir, "ple")
    print("| step | pipeline process, MiB | object store, MiB |\n|---:|---:|---:|")
    for event in steps:
        if event["step"] == 1 or event["step"] % 20 == 0:
            print(f"| {event['step']} | {event['resident_mib']:.1f} | {event['object_store_mib']:.2f} |")
    late = [e["resident_mib"] for e in steps if e["step"] >= 20]
    print(f"\nafter step 20: {late[0]:.1f} -> {late[-1]:.1f} MiB, ratio {late[-1] / late[0]:.3f}")


if __name__ == "__main__":
    main()
