"""The ledger of a run: Parquet parts whose listing says which steps are done, and the prompts that were rejected.

Written by `pipelines.loop.commit` alone, one writer a directory; read by resume, reports and evaluation. Works on a
local disk and on object storage (any pyarrow filesystem). See docs/architecture.md.
"""

import itertools
import os
import re
import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from plumbline.errors import DataError
from plumbline.runs.disk import writing

Row = dict[str, object]

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("prompt_id", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


class Parts:
    """A directory of parts, ``step-000012.parquet`` each: what is listed is done, what is not is to be drawn again.

    Example: ``Parts("runs/a/rollouts/ple", schema).write(12, rows)``; for reading, ``Parts(path, read_only=True)``.

    Args:
        root: a local path or a URI (``s3://bucket/run/rollouts/ple``); made if it is not there.
        schema: columns of every part, also of one with no rows; not needed to read.
        filesystem: a filesystem on which `root` is a path; None finds it from `root`.
        read_only: neither make the directory nor remove temporaries, which may be a running writer's.

    Raises:
        DataError: `root` is a file, or a URI of no known kind.
    """

    _remedy = "remove it, and the step is drawn again on resume"

    def __init__(
        self,
        root: str,
        schema: pa.Schema | None = None,
        *,
        filesystem: fs.FileSystem | None = None,
        read_only: bool = False,
    ) -> None:
        if schema is None and not read_only:
            raise ValueError("Parts that are written need a schema")
        self._files, self._root = _open(root, filesystem)
        if self._files.get_file_info(self._root).type == fs.FileType.File:
            raise DataError(f"{self._root} is a file, where a directory of parts is expected; move it away")
        self._schema = schema
        self._read_only = read_only
        if not read_only:
            self._files.create_dir(self._root, recursive=True)
            _remove_stale(self._files, self._root, r"step-\d+\.parquet")

    def path(self, step: int) -> str:
        """Where the part of `step` is, as a path on the filesystem of `root`."""
        return f"{self._root}/step-{step:06d}.parquet"

    def write(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Commit a step: its part appears whole or not at all, and stays as it was written.

        Raises:
            ValueError: a row has a column that is not in the schema.
            FileExistsError: the step is committed already.
        """
        assert self._schema is not None and not self._read_only, "opened to read"
        table = _table(rows, self._schema)
        path = self.path(step)
        if self._files.get_file_info(path).type != fs.FileType.NotFound:
            raise FileExistsError(f"{path}: step {step} is committed already")
        write_aside(self._files, path, table)

    def steps(self) -> list[int]:
        """The committed steps, ascending; temporaries and other files are not counted."""
        matches = (re.fullmatch(r"step-(\d+)\.parquet", name) for name in _listing(self._files, self._root))
        return sorted(int(match[1]) for match in matches if match)

    def read(self, step: int) -> list[Row]:
        """Rows of one step.

        Raises:
            DataError: the step is not there, or its file is damaged.
        """
        return self.read_table(step).to_pylist()

    def read_table(self, step: int) -> pa.Table:
        """The same as Arrow has it."""
        return read_file(self._files, self.path(step), self._remedy)

    def read_all(self) -> list[Row]:
        """Rows of every committed step, in the order of steps."""
        return [row for step in self.steps() for row in self.read(step)]


class Rejected(Parts):
    """The prompts that ended in no part, and why: ``rejected.parquet`` beside the parts, a directory of parts itself,
    with a file for each step that rejected some. pandas and Arrow read it as one table.

    Add a step's rejections *before* its part is written: after a crash between the two, `keep_steps` forgets them and
    the step is drawn again, so a prompt ends in exactly one place.

    Args:
        root: a local path or a URI ending in ``rejected.parquet``.
        filesystem, read_only: as for `Parts`.
    """

    _remedy = "remove it to forget the rejections of its step"

    def __init__(self, root: str, *, filesystem: fs.FileSystem | None = None, read_only: bool = False) -> None:
        super().__init__(root, REJECTED_SCHEMA, filesystem=filesystem, read_only=read_only)

    def add(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Add a step's rejections (``prompt_id, prompt, reason, detail``), all at once; step 0 is before the first.

        Raises:
            ValueError, FileExistsError: as `write`.
        """
        if rows:
            self.write(step, [{**row, "step": step} for row in rows])

    def keep_steps(self, steps: Collection[int]) -> None:
        """On resume: forget rejections of steps that the ledger does not have, for these steps are drawn again."""
        for step in set(self.steps()) - {0, *steps}:
            self._files.delete_file(self.path(step))

    def count(self, step: int) -> int:
        """Rejections of one step."""
        path = self.path(step)
        there = self._files.get_file_info(path).type != fs.FileType.NotFound
        return self.read_table(step).num_rows if there else 0

    def counts(self) -> dict[str, int]:
        """Rejections by reason, the commonest first."""
        reasons = (self.read_table(step)["reason"].to_pylist() for step in self.steps())
        return dict(Counter(itertools.chain.from_iterable(reasons)).most_common())


def _open(root: str, filesystem: fs.FileSystem | None) -> tuple[fs.FileSystem, str]:
    if filesystem is not None:
        return filesystem, root.rstrip("/")
    if "://" not in root:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(root))
    try:
        found, path = fs.FileSystem.from_uri(root)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"{root}: no storage of this kind ({error}); use a path, or a URI such as s3://bucket/run"
        ) from error
    return found, path.rstrip("/")


def _listing(files: fs.FileSystem, directory: str) -> list[str]:
    found = files.get_file_info(fs.FileSelector(directory, allow_not_found=True))
    return [info.base_name for info in found if info.type == fs.FileType.File]


def _remove_stale(files: fs.FileSystem, directory: str, name: str) -> None:
    """Remove what a crashed writer left aside: there is one writer a directory, and it has only just opened it."""
    for found in _listing(files, directory):
        if re.fullmatch(rf"\.{name}\.tmp-[0-9a-f]+", found):
            files.delete_file(f"{directory}/{found}")


def _table(rows: Sequence[Mapping[str, object]], schema: pa.Schema) -> pa.Table:
    for row in rows:
        unknown = set(row) - set(schema.names)  # pyarrow would drop them silently
        if unknown:
            raise ValueError(f"columns {sorted(unknown)} are not in the part's schema {schema.names}")
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)


def write_aside(files: fs.FileSystem, path: str, table: pa.Table) -> None:
    """Write a temporary beside `path`, then move it there: a rename on a disk, an atomic copy on object storage."""
    directory, _, name = path.rpartition("/")
    aside = f"{directory}/.{name}.tmp-{uuid.uuid4().hex}"
    with writing(path):
        try:
            pq.write_table(table, aside, filesystem=files)
            if isinstance(files, fs.LocalFileSystem):
                _sync(aside)  # or a power cut could keep the new name and lose what it names
            files.move(aside, path)
        except BaseException:
            if files.get_file_info(aside).type != fs.FileType.NotFound:
                files.delete_file(aside)
            raise
    if isinstance(files, fs.LocalFileSystem):
        _sync(directory)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_file(files: fs.FileSystem, path: str, remedy: str) -> pa.Table:
    """A Parquet file. Raises DataError, which names the `remedy`, where it is damaged."""
    try:
        with files.open_input_file(path) as source:
            return pq.ParquetFile(source).read()
    except FileNotFoundError:
        raise DataError(f"{path}: no such part") from None
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read as Parquet ({reason}); {remedy}") from error
