"""Digests of a run's rows, kept when it starts: a data file that was edited before the run goes on is told by them.

Parts are drawn from rows by their places. With other rows there a resumed run would draw some twice and others never.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from plumbline.config.tree import Config
from plumbline.data.dataset import LabelledText
from plumbline.errors import DataError
from plumbline.records import Prompt
from plumbline.runs.parts import read_file, write_aside
from plumbline.runs.rows import Read

FILE = "rows.parquet"
SCHEMA = pa.schema([("source", pa.string()), ("path", pa.string()), ("row", pa.int64()), ("digest", pa.binary(8))])
_PAIR = ("step", "prompt_id", "chosen", "rejected")


def digests_of(config: Config, read: Read) -> pa.Table:
    """A row of `SCHEMA` for every row that the run reads; `source` is the key of the config that names its file."""
    train, heldout = config.data.train, config.data.heldout
    tables = [_table("data.train", train.path, read.prompts, _prompt)]
    if heldout is not None:
        tables.append(_table("data.heldout", heldout.path, read.heldout, _prompt))
    for name, rows in read.given.items():
        tables.append(_table(f"pairs of {name}", _pairs(config, name), rows, _preference))
    for name, table in read.parts.items():
        pairs = zip(*(table.column(column).to_pylist() for column in _PAIR), strict=True)
        tables.append(_digested(f"pairs of {name}", _pairs(config, name), enumerate(pairs, start=1)))
    for name, both in read.rewards.items():
        for key, source, rows in zip(("data.train", "data.heldout"), (train, heldout), both, strict=True):
            if source is not None:
                tables.append(_table(f"{key} of {name}", source.path, rows, _labelled))
    return pa.concat_tables(tables)


def check_digests(run_dir: Path, now: pa.Table) -> None:
    """Raises DataError where a row is another than when the run in `run_dir` started; nothing where none is there."""
    if not (run_dir / FILE).exists():
        return
    then = _by_source(read_file(fs.LocalFileSystem(), str(run_dir / FILE), "remove it, and rows are not compared"))
    for source, (path, rows) in _by_source(now).items():
        for before, here in zip_longest(then.get(source, ("", []))[1], rows):
            if before != here:
                what = "is new" if before is None else "is gone" if here is None else "is another"
                row = (here or before or ("?", None))[0]
                raise DataError(
                    f"{path}, row {row}: {what} since the run in {run_dir} began, and steps draw rows by their places; "
                    "put the file back as it was, or start anew with another `name` or --run-dir (what is done stays)"
                )


def keep_digests(run_dir: Path, now: pa.Table) -> Path:
    """Write the file of the digests where there is none. Raises DataError as `check_digests`."""
    check_digests(run_dir, now)
    if not (run_dir / FILE).exists():
        write_aside(fs.LocalFileSystem(), str(run_dir / FILE), now)
    return run_dir / FILE


def digests_by_source(run_dir: Path) -> dict[str, tuple[int, str]]:
    """How many rows a run reads of each source, and a digest over all of them; empty where none were kept."""
    if not (run_dir / FILE).exists():
        return {}
    table = read_file(fs.LocalFileSystem(), str(run_dir / FILE), "remove it, and rows are not compared")
    rows: dict[str, list[bytes]] = {}
    for source, digest in zip(table.column("source").to_pylist(), table.column("digest").to_pylist(), strict=True):
        rows.setdefault(source, []).append(digest)
    return {source: (len(own), blake2b(b"".join(own), digest_size=16).hexdigest()) for source, own in rows.items()}


def _pairs(config: Config, name: str) -> str:
    return next(p.pairs.path for p in config.pipelines if p.name == name and getattr(p, "pairs", None))  # type: ignore[union-attr]


def _table(source: str, path: str, rows: Sequence[Any], content: Any) -> pa.Table:
    return _digested(source, path, ((row.row, content(row)) for row in rows))


def _digested(source: str, path: str, rows: Iterable[tuple[int, object]]) -> pa.Table:
    numbered = [(number, blake2b(repr(content).encode(), digest_size=8).digest()) for number, content in rows]
    return pa.table(
        {
            "source": [source] * len(numbered),
            "path": [path] * len(numbered),
            "row": [number for number, _ in numbered],
            "digest": [digest for _, digest in numbered],
        },
        schema=SCHEMA,
    )


def _prompt(prompt: Prompt) -> tuple[object, ...]:
    return prompt.id, [(turn.role, turn.content) for turn in prompt.messages], prompt.target, dict(prompt.extra)


def _preference(prompt: Prompt) -> tuple[object, ...]:
    return *_prompt(prompt), prompt.chosen, prompt.rejected


def _labelled(row: LabelledText | Prompt) -> tuple[object, ...]:
    if isinstance(row, Prompt):
        return _preference(row)
    return row.text, row.label, [(turn.role, turn.content) for turn in row.messages or ()]


def _by_source(table: pa.Table) -> Mapping[str, tuple[str, list[tuple[int, bytes]]]]:
    found: dict[str, tuple[str, list[tuple[int, bytes]]]] = {}
    for source, path, row, digest in _columns(table):
        found.setdefault(source, (path, []))[1].append((row, digest))  # another machine may have it elsewhere
    return found


def _columns(table: pa.Table) -> Iterator[tuple[str, str, int, bytes]]:
    return zip(*(table.column(name).to_pylist() for name in SCHEMA.names), strict=True)
