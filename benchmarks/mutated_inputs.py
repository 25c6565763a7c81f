"""Wrong configs and data files by the thousand, through the command line: refused in lines of ours, or right.

    python benchmarks/mutated_inputs.py --count 1000

Half are shipped configs (`configs/`), for `plumbline doctor`, half data files of each form, for `plumbline validate`,
in an empty directory. Each has up to three things wrong: a key gone, or of another name, value or type, bytes
changed, put in or cut off, another encoding. Allowed are the exit codes 0 and 2, the latter with a line of ours, within
`SECONDS`. What else comes is printed with its seed, which makes the same again (`--first SEED --count 1`).
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cli.main import main as plumbline

SECONDS = 30
CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
KINDS = ("prompts", "targets", "labelled", "preferences")
FORMATS = ("jsonl", "csv", "parquet", "jsonl.gz")
ROWS: list[dict[str, Any]] = [
    {"id": f"r{i}", "prompt": f"Why {i}?", "target": "So.", "chosen": "a", "rejected": "b", "text": "x", "label": i % 2}
    for i in range(4)
]
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**40, 0.0, 1e-300, 1e308, 2.5, -1.5, float("nan"), float("inf"), "",
    " ", "a", "\x00", "a\nb", "\ufeff", "💥" * 50, "../x", "~", "%s{}", "1", "1e999", "auto", "lora", "ple", "{}",
    "a" * 3000, [], [[]], [None], [0], [1, 4], ["a"], ["", "b"], {}, {"a": 1}, {"a\nb": 1e300}, {None: 1}, {1: 2},
    {"type": "ple"}, {"type": "dlma"}, {"type": None}, [{"type": "self_contrast"}], {"path": "a"}, {"path": ""},
    [{"role": "user", "content": "a"}], [{"role": "user"}], [{"role": 3, "content": None}], {"replicas": [1, 0]},
)  # fmt: skip
BYTES = (
    b"\x00",
    b"\r",
    b'"',
    b"\n",
    b"\xff\xfe",
    b"[" * 5000,
    b"{",
    b": ",
    b"\t",
    b"!!python/name:os.system ",
    b"&a *a",
)


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (mapping or list, key) of a tree."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, dict | list):
            yield from places(value)


def change_tree(tree: Any, rng: Random) -> None:
    """Up to three things in it become others."""
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        found = list(places(tree))
        if not found:
            return
        node, key = rng.choice(found)
        how = rng.random()
        if how < 0.2:
            del node[key]
        elif how < 0.35 and isinstance(node, dict):
            node[rng.choice(("max_len", "steps", "pairs", "train", "kept", "", "a\nb", 3, None))] = node.pop(key)
        elif how < 0.5:
            other, at = rng.choice(found)
            node[key] = deepcopy(other[at]) if at in (other if isinstance(other, dict) else range(len(other))) else None
        else:
            node[key] = deepcopy(rng.choice(ODD))


def change_bytes(content: bytes, rng: Random) -> bytes:
    """One time in three, bytes of it become others."""
    for _ in range(rng.choice((0, 0, 0, 0, 1, 2))):
        at = rng.randrange(len(content) + 1)
        content = content[:at] + rng.choice((*BYTES, rng.randbytes(3))) + content[at + rng.randrange(5) :]
    return content[: rng.randrange(len(content) + 1)] if rng.random() < 0.08 else content


def encode(text: str, rng: Random) -> bytes:
    """UTF-8, now and then another encoding."""
    return text.encode(rng.choice((*["utf-8"] * 12, "utf-8-sig", "utf-16", "utf-32", "cp500")), "replace")


def data_file(rows: list[dict[str, Any]], form: str, rng: Random) -> bytes:
    """Rows in a format. What Arrow cannot hold together, such as a text and a number in a column, becomes text."""
    if form == "parquet":
        out = io.BytesIO()
        try:
            made = pa.Table.from_pylist(rows)
        except (pa.ArrowException, OverflowError, TypeError, ValueError, AttributeError):
            made = pa.Table.from_pylist([{str(name): repr(value) for name, value in row.items()} for row in rows])
        pq.write_table(made, out)
        return out.getvalue()
    if form == "csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = [names, *([row.get(name, "") for name in names] for row in rows)]
        return encode("".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in lines), rng)
    content = encode("".join(json.dumps(row) + "\n" for row in rows), rng)
    return gzip.compress(change_bytes(content, rng)) if form == "jsonl.gz" else content


def mutated(seed: int) -> tuple[list[str], str, bytes]:
    """The command's first words, the name of its file, and what is in that."""
    rng = Random(seed)
    if rng.random() < 0.5:
        tree = yaml.safe_load(rng.choice(CONFIGS).read_text("utf-8"))
        change_tree(tree, rng)
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        return ["doctor"], "config.yaml", change_bytes(encode(text, rng), rng)
    rows, form = deepcopy(ROWS), rng.choice(FORMATS)
    change_tree(rows, rng)
    rows = [row for row in rows if isinstance(row, dict)]
    content = change_bytes(data_file(rows, form, rng), rng)
    return ["validate", "--kind", rng.choice(KINDS)], f"data.{form}", content


def late(*_: Any) -> None:
    raise TimeoutError(f"no answer within {SECONDS} s")


def outcome(seed: int) -> str:
    """`0` or `2`, or what went wrong, with the place where it did."""
    words, name, content = mutated(seed)
    Path(name).write_bytes(content)
    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = plumbline([*words, name])
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({at.filename}:{at.lineno})"
    finally:
        signal.alarm(0)
    lines = err.getvalue().splitlines()
    ours = [line for line in lines if line.startswith(("plumbline: ", "FAIL "))]
    if (code == 0 and not ours) or (code == 2 and ours and lines == ours):
        return str(code)
    return f"exit code {code}: {err.getvalue()[:500]!r}"


def main() -> None:
    """Try them, and say what came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    options = parser.parse_args()
    started, slowest, came = time.monotonic(), 0.0, Counter[str]()
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        os.environ["HF_HUB_OFFLINE"] = "1"
        for seed in range(options.first, options.first + options.count):
            begun = time.monotonic()
            what = outcome(seed)
            slowest = max(slowest, time.monotonic() - begun)
            came[what if what in ("0", "2") else "wrong"] += 1
            if what not in ("0", "2"):
                print(f"seed {seed}: {' '.join(mutated(seed)[0])}: {what}", flush=True)
    print(dict(sorted(came.items())), f"{time.monotonic() - started:.0f} s, the slowest {slowest:.1f} s")


if __name__ == "__main__":
    main()
