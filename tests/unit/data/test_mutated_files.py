"""Data files with anything wrong in them: read, or refused in one line that names the file.

PLUMBLINE_EXAMPLES=1000 looks longer.
"""

import gzip
import json
import os
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plumbline.data.dataset import read_labelled, read_preferences, read_prompts
from plumbline.errors import DataError

EXAMPLES = int(os.environ.get("PLUMBLINE_EXAMPLES", "25"))
SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
Rows = list[dict[str, Any]]
READERS: Sequence[Callable[[str], list[Any]]] = (
    read_prompts,
    lambda path: read_prompts(path, target="needed"),
    lambda path: read_prompts(path, target="read", where={"label": 1}, limit=2),
    read_preferences,
    read_labelled,
)
GOOD: Rows = [
    {"id": f"r{i}", "prompt": f"Why {i}?", "target": "So.", "chosen": "a", "rejected": "b", "text": "x", "label": i % 2}
    for i in range(4)
]
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "Why?"},
]
TEXT = st.text(st.characters(blacklist_categories=())) | st.sampled_from(
    ["", " ", "\x00", "\ud800", '"', "a,b\n", "\ufeff", "1e999"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(
    SCALARS | st.just(TURNS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]) | TEXT, inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from([*GOOD[0], "messages", "extra", ""])


def as_jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: Rows) -> bytes:
    names = list(rows[0])
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    quoted = (",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines)
    return ("\n".join(quoted) + "\n").encode("utf-8", "surrogatepass")


def as_parquet(rows: Rows) -> bytes:
    """What Arrow cannot hold together, such as a text and a number in one column, no such file has."""
    out = BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), out)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        pq.write_table(pa.Table.from_pylist(GOOD), out)
    return out.getvalue()


FORMATS = {
    "a.jsonl": as_jsonl,
    "a.csv": as_csv,
    "a.parquet": as_parquet,
    "a.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
}


@st.composite
def edits(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with some bytes changed, put in or cut out, or without its end."""
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 4))
        put = draw(st.binary(max_size=4) | st.sampled_from([b"\x00", b"\r", b'"', b"\n", b"\xff\xfe", b"[" * 5000]))
        content = content[:at] + put + content[at + length :]
    return content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 4)) == 0 else content


@st.composite
def changed_rows(draw: st.DrawFn) -> Rows:
    rows = [dict(row) for row in GOOD]
    for _ in range(draw(st.integers(1, 4))):
        row, name = draw(st.sampled_from(rows)), draw(NAMES)
        if draw(st.booleans()):
            row[name] = draw(VALUES)
        else:
            row.pop(name, None)
    return rows


def check(path: Path) -> None:
    for read in READERS:
        try:
            assert read(str(path))
        except DataError as error:
            message = str(error)
            assert message.startswith(str(path)) and "\n" not in message, message
            message.encode()  # it can be printed


@pytest.mark.parametrize("name", FORMATS)
@settings(
    max_examples=EXAMPLES,
    deadline=5000,
    derandomize=True,
    suppress_health_check=SLOW,
)
@given(data=st.data())
def test_bytes_that_are_others(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data.draw(edits(FORMATS[name](GOOD))))
    check(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
@settings(
    max_examples=EXAMPLES,
    deadline=5000,
    derandomize=True,
    suppress_health_check=SLOW,
)
@given(rows=changed_rows())
def test_values_that_are_others(tmp_path_factory: pytest.TempPathFactory, name: str, rows: Rows) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(FORMATS[name](rows))
    check(path)
