"""Answers to held-out prompts, kept of every version that was evaluated: ``evaluated/ple@12.parquet``, a row a prompt.

Evaluation and the gate write them, a version anew each time; the report shows them side by side.
"""

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from random import Random
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from plumbline.errors import DataError
from plumbline.records import Prompt
from plumbline.runs.parts import Row, read_file, write_aside
from plumbline.runs.rollouts import prompt_text

DIRECTORY = "evaluated"
LONGEST = 200
"""Characters of a file's name: of a longer path its end, for file systems take no more than 255."""
SCHEMA = pa.schema([("key", pa.string()), ("prompt", pa.string()), ("answer", pa.string()), ("reward", pa.float64())])
"""`key` is `prompt_key`'s; `reward` is null where there is none, or none that is finite."""


def prompt_key(prompt: Prompt) -> str:
    """What a prompt is known by in every run: a digest of its turns, whatever the file or the row it came from."""
    turns = json.dumps([(turn.role, turn.content) for turn in prompt.messages])
    return blake2b(turns.encode(), digest_size=8).hexdigest()


def heldout_order(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Held-out prompts in the order of a run's seed: an evaluation asks the first of them, `tune` some of the rest."""
    ordered = list(prompts)
    Random(seed).shuffle(ordered)
    return ordered


def keep_answers(
    run_dir: Path, who: str, prompts: Sequence[Prompt], answers: Sequence[str], rewards: Sequence[float | None]
) -> None:
    """Write the file of a version (``ple@12``), of ``base``, or of a model's directory, in place of the one before.

    Args:
        answers: [N], of the prompts.
        rewards: [N], or none at all.
    """
    scores = rewards or [None] * len(prompts)
    rows = [
        {"key": prompt_key(prompt), "prompt": prompt_text(prompt), "answer": answer, "reward": score}
        for prompt, answer, score in zip(prompts, answers, scores, strict=True)
    ]
    (run_dir / DIRECTORY).mkdir(exist_ok=True)
    name = quote(who, safe="@")[-LONGEST:]
    path = run_dir / DIRECTORY / f"{name}.parquet"
    write_aside(fs.LocalFileSystem(), str(path), pa.Table.from_pylist(rows, schema=SCHEMA))


def read_answers(run_dir: Path) -> dict[str, list[Row]]:
    """Rows of `SCHEMA` by whose they are, in no order of note. Raises DataError where a file is damaged."""
    found = {}
    for path in sorted((run_dir / DIRECTORY).glob("*.parquet")):
        table = read_file(fs.LocalFileSystem(), str(path), "remove it, or evaluate that version again")
        if table.schema != SCHEMA:
            raise DataError(f"{path}: its columns are not those of answers; remove it, or evaluate that version again")
        found[unquote(path.stem)] = table.to_pylist()
    return found
