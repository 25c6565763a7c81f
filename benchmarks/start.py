"""What a run does with its rows before its first part: seconds and memory of each stage, against what bounds them.

    python benchmarks/start.py [--rows 200000] [--methods ple self_contrast dlma] [--out DIR]

Rows are of some thirty words of a made-up language, and targets of as many; the tokenizer is a byte-level BPE of it.
What works is what `plumbline run` calls in its own process, without engines: reading and checking, digests, lengths,
the methods with the prompts of their first part. The bound is a bare loop over the file: `json.loads` of each line, and
`tokenizers` over each text once, in batches on all processors. Each is a process of its own. Memory is resident: after
a stage, without what was there before the first one, and the most that the process had.
"""

import argparse
import asyncio
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
from worlds import table

WORDS, VOCABULARY = 20_000, 8192
AT_ONCE = 1024


def make_files(out: Path, rows: int) -> Path:
    """A tokenizer, and a file of as many rows; what is there stays. Returns the file."""
    words = made_words(random.Random(0))
    if not (out / "model" / "tokenizer.json").exists():
        make_tokenizer(out / "model", words)
    file = out / f"rows-{rows}.jsonl"
    if not file.exists():
        rng = np.random.default_rng(rows)
        bounds = np.cumsum(1 / np.arange(10, WORDS + 10))
        with file.open("w", encoding="utf-8") as stream:
            for i in range(rows):
                drawn = [words[k] for k in bounds.searchsorted(rng.random(60) * bounds[-1])]
                cut = int(rng.integers(20, 41))
                row = {"id": f"p{i}", "prompt": " ".join(drawn[:cut]) + "?", "target": " ".join(drawn[cut:]) + "."}
                stream.write(json.dumps(row) + "\n")
    return file


def made_words(rng: random.Random) -> list[str]:
    syllables = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "r", "s")]
    return ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(WORDS)]


def make_tokenizer(directory: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from plumbline.data.tokenizer import TEMPLATES

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([" ".join(words)], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=marks[2], pad_token=marks[0], chat_template=TEMPLATES["chatml"]
    ).save_pretrained(directory)


def make_config(file: Path, methods: list[str]) -> Any:
    from plumbline.config.file import parse_config

    learner = {"cpus": 1, "gpus": 0}
    return parse_config(
        {
            "name": "start",
            "model": {"path": str(file.parent / "model"), "max_len": 512},
            "data": {"train": {"path": str(file)}},
            "reward": {"type": "program", "function": "a:b"},
            "embedder": {"path": "none"} if "self_contrast" in methods else None,
            "pipelines": [{"type": one, "generation": {"max_tokens": 64}, "learner": learner} for one in methods],
        },
        origin="benchmark",
    )


@contextmanager
def stage(name: str, told: dict[str, Any]) -> Iterator[None]:
    """Note a stage's seconds, those of processors, and the memory after it."""
    started, worked = time.perf_counter(), time.process_time()
    yield
    told[name] = (time.perf_counter() - started, time.process_time() - worked, resident())


def resident() -> float:
    return psutil.Process().memory_info().rss / 2**20


def most() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def run_bound(file: Path) -> dict[str, Any]:
    """The file read and every text of it tokenised, nothing kept."""
    from tokenizers import Tokenizer

    core = Tokenizer.from_file(str(file.parent / "model" / "tokenizer.json"))
    told: dict[str, Any] = {"before": resident()}
    with stage("read", told):
        texts: list[str] = []
        with file.open(encoding="utf-8") as stream:
            for line in stream:
                row = json.loads(line)
                texts += (row["prompt"], row["target"])
    with stage("tokenise", told):
        for start in range(0, len(texts), AT_ONCE):
            core.encode_batch_fast(texts[start : start + AT_ONCE], add_special_tokens=False)
    return told


def run_stages(file: Path, methods: list[str]) -> dict[str, Any]:
    """What `plumbline run` does of its start that grows with the rows."""
    import ray  # noqa: F401  what a run has imported by then
    import torch  # noqa: F401

    from pipelines.context import Context, EventLog
    from pipelines.run import METHODS
    from plumbline.data.tokenizer import run_tokenizer
    from plumbline.runs.digests import digests_of, keep_digests
    from plumbline.runs.rows import fit_rows, read_rows

    config = make_config(file, methods)
    tokenizer = run_tokenizer(config)
    told: dict[str, Any] = {"before": resident()}
    with tempfile.TemporaryDirectory() as run_dir:
        with stage("read and check", told):
            read = read_rows(config)
        with stage("digests", told):
            digests = digests_of(config, read)
        with stage("render and count", told):
            rows = fit_rows(config, tokenizer, read)
        with stage("keep digests", told):
            keep_digests(Path(run_dir), digests)
        fleet: Any = SimpleNamespace()
        context = Context(
            config=config, run_dir=Path(run_dir), device="cpu", dtype="float32", tokenizer=tokenizer, rows=rows,
            events=EventLog(Path(run_dir) / "events.jsonl", lambda event: None), fleet=fleet,
        )  # fmt: skip
        with stage("first prompts", told):
            asyncio.run(first_prompts([METHODS[one.type](context, one) for one in config.methods]))
    return told


async def first_prompts(methods: list[Any]) -> None:
    for method in methods:
        drawn = method._draw(1)
        await method._requests(1, drawn, method.ref(0), {"sample": None})


def measured(kind: str, file: Path, methods: list[str]) -> dict[str, Any]:
    """One of the two, in a process of its own."""
    command = [sys.executable, __file__, "--stage", kind, "--file", str(file), "--methods", *methods]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000])
    parser.add_argument("--methods", nargs="+", default=["ple", "dlma", "self_contrast"])
    parser.add_argument("--out", type=Path, default=Path("runs/start"))
    parser.add_argument("--stage", choices=["bound", "stages"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        bound = options.stage == "bound"
        told = run_bound(options.file) if bound else run_stages(options.file, options.methods)
        print(json.dumps(told | {"most": most()}))
        return
    for count in options.rows:
        file = make_files(options.out.absolute(), count)
        rows = []
        totals = []
        for kind in ("bound", "stages"):
            told = measured(kind, file, options.methods)
            before, peak = told.pop("before"), told.pop("most")
            for name, (seconds, worked, mib) in told.items():
                rows.append([f"{kind}: {name}", f"{seconds:.1f}", f"{worked:.1f}", f"{mib - before:.0f}"])
            seconds, worked = (sum(one[i] for one in told.values()) for i in (0, 1))
            rows.append([f"{kind}, together", f"{seconds:.1f}", f"{worked:.1f}", f"{peak - before:.0f} at most"])
            totals.append(worked)
        print(table([f"{count:,} rows, {file.stat().st_size / 2**20:.0f} MiB", "s", "processor s", "MiB"], rows))
        print(f"\nprocessor seconds, stages to bound: {totals[1] / totals[0]:.1f}×\n")


if __name__ == "__main__":
    main()
