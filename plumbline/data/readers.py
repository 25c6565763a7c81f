"""Files and Hugging Face datasets to raw rows, one after another; `plumbline.data.dataset` calls it and checks them.

Every way in which a file itself can be wrong (missing, damaged, another encoding) ends here, as a one-line DataError.
"""

import csv
import gzip
import json
import sys
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from plumbline.config.reading import OnBad
from plumbline.errors import DataError, RowError
from plumbline.submitted import left_out

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")

_GZIP = b"\x1f\x8b"
RawRow = tuple[int, Mapping[str, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a row is: in which file, in which row (a JSON Lines row's is its line), and which it is of all files'."""

    file: str
    row: int
    number: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


PlacedRow = tuple[Place, Mapping[str, object]]


def stop(error: RowError) -> None:
    """Of bad rows, the first ends the reading."""
    raise error


def read_rows(
    path: str, *, split: str = "train", limit: int | None = None, on_bad: OnBad = stop
) -> Iterator[PlacedRow]:
    """Rows of a .jsonl, .jsonl.gz, .parquet or .csv file, of a directory of such, or of a Hugging Face dataset.

    Yields (place, columns), streaming. A CSV's empty cells are None. Stops after `limit` rows. `split` is for
    directories, where the files' names say it as Hugging Face has it, and for datasets. A line that is no row goes to
    `on_bad`, where the lines after it can be told.

    Raises:
        DataError: naming the file, the row where there is one, what is wrong and what would be right.
    """
    bad = False

    def noted(error: RowError) -> None:
        nonlocal bad
        bad = True
        on_bad(error)

    rows = islice(_open(path, split, noted), limit)
    first = next(rows, None)
    if first is None:
        if bad:
            return
        raise DataError(f"{path}: no rows in it; write at least one")
    yield first
    yield from rows


def _open(path: str, split: str, on_bad: OnBad) -> Iterator[PlacedRow]:
    """The rows of all files of `path`, one file after the other."""
    before = 0
    for file, rows in _sources(path, split, on_bad):
        number = 0
        for number, values in rows:
            yield Place(file=file, row=number, number=before + number), values
        before += number


def _sources(path: str, split: str, on_bad: OnBad) -> Iterator[tuple[str, Iterator[RawRow]]]:
    """Each file with its rows. A directory's files are read as they stand: a schema that the first of them set would
    refuse a later one, for a column that is empty in one and text in the other."""
    if "://" in path:
        raise DataError(f"{path}: data is not read from an address; copy it to a disk that this run sees")
    directory = Path(path).expanduser()
    if not directory.is_dir():
        yield path, _file(path, split, on_bad)
    elif any((directory / name).exists() for name in _SAVED):
        yield path, _dataset(path, directory, split)
    elif files := _data_files(path, directory, split):
        yield from ((file, _file(file, split, on_bad)) for file in files)
    else:
        yield path, _dataset(path, directory, split)


_SAVED = ("state.json", "dataset_dict.json")


def _data_files(path: str, directory: Path, split: str) -> list[str]:
    """The files of a split, as Hugging Face finds them; none where one is of another kind than ours.

    Raises:
        DataError: there are data files, and none of this split.
    """
    import datasets

    try:
        found = datasets.load_dataset_builder(str(directory)).config.data_files or {}
    except Exception:  # of many kinds: loading it as a dataset says which
        return []
    files = [str(file) for file in found.get(split, [])]
    if found and not files:
        raise DataError(f"{path}: no split {split!r}; it has {', '.join(map(str, found))}: set `split`")
    return files if all(file.lower().endswith(SUFFIXES) for file in files) else []


def _file(path: str, split: str, on_bad: OnBad) -> Iterator[RawRow]:
    file = Path(path).expanduser()
    known = next((suffix for suffix in reversed(SUFFIXES) if path.lower().endswith(suffix)), None)
    if not file.exists():
        if known or path.startswith((".", "/", "~")) or path.count("/") > 1:
            hint = f"name a {', '.join(SUFFIXES)} file or a Hugging Face dataset{left_out(path)}"
            raise DataError(f"{path}: no such file; {hint}")
        return _dataset(path, None, split)
    if known is None:
        hint = "; write one JSON object a line and call it .jsonl" if path.lower().endswith(".json") else ""
        raise DataError(f"{path}: unknown suffix {file.suffix!r}; it should be one of {', '.join(SUFFIXES)}{hint}")
    if file.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; write at least one row")
    return {".jsonl": _jsonl, ".jsonl.gz": _jsonl_gz, ".parquet": _parquet, ".csv": _csv}[known](path, file, on_bad)


def _jsonl(path: str, file: Path, on_bad: OnBad) -> Iterator[RawRow]:
    with _opened(path, file) as stream:
        yield from _json_rows(path, stream, on_bad)


def _jsonl_gz(path: str, file: Path, on_bad: OnBad) -> Iterator[RawRow]:
    try:
        with _opened(path, file) as stream, gzip.open(stream) as unzipped:
            yield from _json_rows(path, unzipped, on_bad)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: damaged gzip ({error}); compress the .jsonl again, or drop .gz if it is none"
        ) from error


def _json_rows(path: str, stream: IO[bytes] | gzip.GzipFile, on_bad: OnBad) -> Iterator[RawRow]:
    for number, line in _text_lines(path, stream, on_bad):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip())  # or what is missing at its end would be missed in column 1 of line 2
        except (ValueError, RecursionError) as error:
            what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else _one_line(error)
            on_bad(RowError(path, number, None, f"broken JSON ({what}); write one JSON object on a line"))
            continue
        if not isinstance(row, dict):
            kind = {list: "a list", str: "text", type(None): "null"}.get(type(row), f"the value {row!r:.40}")
            on_bad(RowError(path, number, None, f"{kind}, not an object; write {{...}} with the columns as keys"))
            continue
        yield number, row


def _csv(path: str, file: Path, on_bad: OnBad) -> Iterator[RawRow]:
    csv.field_size_limit(sys.maxsize)  # the module's own is 128 KiB, which a text may well have
    with _opened(path, file) as stream:
        reader = csv.reader((line for _, line in _text_lines(path, stream)), strict=True)
        begun = 1
        try:
            header = next(reader, [])
            _check_names(path, header, "its header")
            for number, cells in enumerate((cells for cells in reader if cells), start=1):
                begun = reader.line_num + 1
                if len(cells) != len(header):
                    many = f"{len(cells)} cells where the header has {len(header)}"
                    remedy = 'put text that holds commas or line breaks between double quotes (")'
                    on_bad(RowError(path, number, None, f"{many}; {remedy}"))
                    continue
                yield number, {name: cell or None for name, cell in zip(header, cells, strict=True)}
        except csv.Error as error:
            raise DataError(f"{path}, line {begun}: broken CSV ({error}); {_csv_remedy(str(error))}") from error


def _csv_remedy(problem: str) -> str:
    if "unexpected end" in problem:
        return 'the text that begins there has no closing quote ("); close it, or write the rows as .jsonl'
    if "new-line character" in problem:
        return "its lines end in \\r alone; save it with \\n"
    return 'put its texts between double quotes, a quote in a text as two (""), or write the rows as .jsonl'


def _parquet(path: str, file: Path, _: OnBad) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with _opened(path, file) as stream:
            table = pq.ParquetFile(stream)
            _check_names(path, table.schema_arrow.names, "it")
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after row {number}: text that is not UTF-8; write it as UTF-8") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged Parquet ({_one_line(error)}); write the file again") from error
    except (OverflowError, ValueError) as error:  # a date of no calendar, or finer than a microsecond
        raise DataError(f"{path}, after row {number}: a value that cannot be read ({_one_line(error)})") from error


def _check_names(path: str, names: Sequence[str], what: str) -> None:
    """Raises DataError where a column would take another's place."""
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{path}: {what} names column {sorted(repeated)[0]!r} twice; rename one")


def _dataset(path: str, directory: Path | None, split: str) -> Iterator[RawRow]:
    """Rows of a saved dataset, of a directory of data files, or of a dataset of the hub. No code of theirs is run."""
    import datasets

    datasets.disable_progress_bars()  # an error is to be the only line on stderr
    saved = directory is not None and any((directory / name).exists() for name in _SAVED)
    try:
        if saved:
            table = datasets.load_from_disk(str(directory))
            if isinstance(table, datasets.DatasetDict):
                if split not in table:
                    raise DataError(f"{path}: no split {split!r}; it has {', '.join(map(str, table))}: set `split`")
                table = table[split]
        else:
            table = datasets.load_dataset(str(directory or path), split=split)
    except DataError:
        raise
    except Exception as error:  # datasets raises its own kinds, Arrow's, the hub's, and OSError
        raise DataError(_dataset_problem(path, directory, split, error)) from error
    number = 0
    try:
        for number, row in enumerate(table, start=1):
            assert isinstance(row, Mapping)
            yield number, row
    except Exception as error:  # a row is decoded as it is drawn, by whatever library its columns need
        raise DataError(f"{path}, after row {number}: a value that cannot be read ({_one_line(error)})") from error


def _dataset_problem(path: str, directory: Path | None, split: str, error: Exception) -> str:
    if directory is None and isinstance(error, ConnectionError):
        return f"{path}: no such file here, and the Hugging Face hub cannot be reached for a dataset of that name"
    if directory is None and type(error).__name__ == "DatasetNotFoundError":
        return f"{path}: neither a file here nor a dataset of the Hugging Face hub"
    if type(error).__name__ in ("EmptyDatasetError", "DataFilesNotFoundError"):
        return f"{path}: a directory without data files; name a {', '.join(SUFFIXES)} file or a saved dataset"
    return f"{path}: cannot be loaded as a dataset, split {split!r} ({_one_line(error.__cause__ or error)})"


def _text_lines(path: str, stream: IO[bytes] | gzip.GzipFile, on_bad: OnBad | None = None) -> Iterator[tuple[int, str]]:
    """Lines decoded as UTF-8, numbered from 1; a byte order mark is dropped. A line that is no text goes to `on_bad`;
    where rows are no lines, and there is none, it ends the file."""
    start = 0
    for number, line in enumerate(stream, start=1):
        wrong = text = None
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            remedy = "it is gzip, call it .jsonl.gz" if line[:2] == _GZIP and start == 0 else "save it as UTF-8"
            wrong = f"not UTF-8 at byte {start + error.start}; {remedy}"
            if line[:2] in (_GZIP, BOM_UTF16_LE, BOM_UTF16_BE) and start == 0:  # no line of it is text
                raise DataError(f"{path}, row {number}: {wrong}") from error
        if text is not None and "\0" in text:
            wrong = "zero bytes, as UTF-16 text has; save it as UTF-8"
        start += len(line)
        if wrong is None:
            assert text is not None
            yield number, text
        elif on_bad is None:
            raise DataError(f"{path}, line {number}: {wrong}")
        else:
            on_bad(RowError(path, number, None, wrong))


@contextmanager
def _opened(path: str, file: Path) -> Iterator[IO[bytes]]:
    try:
        stream = file.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}); make it readable") from error
    with stream:
        yield stream


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
