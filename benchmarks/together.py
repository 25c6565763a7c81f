"""Three methods at once over one pool against one after the other: wall-clock, the pool's shares, the longest waits.

    python benchmarks/together.py [--seed 0] [--out runs/together]

`configs/quickstart.yaml` in the miniature world, and each of its pipelines in a run of its own, with the same settings.
Seconds of training are from the first to the last of a run's events; starting up and comparing count in the others.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from worlds import events, make_world, table


def timed(out: Path, config: dict[str, Any], name: str, pipelines: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of a whole run, and of its training."""
    directory, file, kept = out / name, out / f"{name}.yaml", out / f"{name}.json"
    if not kept.exists():
        file.write_text(yaml.safe_dump(config | {"name": name, "pipelines": pipelines}))
        started = time.perf_counter()
        command = [sys.executable, "-m", "cli", "run", str(file), "--run-dir", str(directory)]
        subprocess.run(command, check=True, stdout=2)
        kept.write_text(json.dumps(time.perf_counter() - started))
    pool = events(directory, "pool")
    return json.loads(kept.read_text()), pool[-1]["time"] - pool[0]["time"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/together"))
    options = parser.parse_args()
    out = options.out.absolute()
    world = make_world(out / f"world-{options.seed}", options.seed)
    config: dict[str, Any] = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    config["model"]["path"] = str(world / "model")
    config["embedder"]["path"] = str(world / "embedder")
    for part in ("train", "heldout"):
        config["data"][part]["path"] = str(world / f"prompts_{part}.jsonl")
    pipelines: list[dict[str, Any]] = config["pipelines"]
    # Each run computes its own reference log-probs: none is a gift of the one before.
    config["fleet"] = {"reference": {"cache": str(out / "cache-together")}}
    together = timed(out, config, "together", pipelines)
    config["fleet"] = {"reference": {"cache": str(out / "cache-alone")}}
    alone = {}
    for one in pipelines:
        embedder = config["embedder"] if one["type"] == "self_contrast" else None
        alone[one["type"]] = timed(out, {**config, "embedder": embedder}, f"alone-{one['type']}", [one])
    total = [sum(seconds[i] for seconds in alone.values()) for i in (0, 1)]
    rows = [[name, *(f"{s:.0f}" for s in seconds)] for name, seconds in alone.items()]
    rows += [["one after the other", *(f"{s:.0f}" for s in total)], ["together", *(f"{s:.0f}" for s in together)]]
    rows += [["ratio", *(f"{one / both:.2f}×" for one, both in zip(total, together, strict=True))]]
    print(table(["run", "whole, s", "training, s"], rows), "\n")
    pool = events(out / "together", "pool")
    first_end = min(events(out / "together", one["type"])[-1]["time"] for one in pipelines)
    contended, last = [line for line in pool if line["time"] <= first_end][-1]["shares"], pool[-1]
    head = ["pipeline", "tokens while all three ran", "tokens of the run", "longest wait, s"]
    rows = [
        [name, f"{contended[name]:.0%}", f"{share:.0%}", f"{last['longest_waits'][name]:.1f}"]
        for name, share in last["shares"].items()
    ]
    print(table(head, rows))


if __name__ == "__main__":
    main()
