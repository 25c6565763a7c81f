"""Log-probs that a frozen model has computed before: sums over responses, in SQLite, keyed by what they depend on.

`actors.reference` asks it before every forward pass, so that a resumed run, or a second one over the same pairs,
computes nothing twice. Several processes may share a file; on a network's file system, whose locks must work, those of
several machines, which then wait for one another's writing.
"""

import hashlib
import math
import sqlite3
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from plumbline.errors import ModelError, RunError
from plumbline.records import TokenGroup

_BUSY_S = 60.0  # how long a process waits for another one's writing
_KEYS_AT_ONCE = 500  # the oldest SQLite takes 999 parameters
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)  # the last: tables that are not ours

_NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "glusterfs",
    "virtiofs",
    "afs",
    "panfs",
}

_MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)


class LogpCache:
    """Sums of log-probs in nats by (model, prompt ids, response ids); values are float64.

    Args:
        path: the SQLite file, made where there is none; None keeps everything in memory.
        model: what computed the values; `model_fingerprint` gives one that covers weights and tokenizer.

    Attributes:
        hits, misses: responses that `get` knew and did not know.

    Raises:
        RunError: the file is damaged, or cannot be read and written. Every method may raise it.
    """

    def __init__(self, path: Path | None, model: str) -> None:
        self.hits = 0
        self.misses = 0
        self._path = path
        self._model = hashlib.sha256(model.encode()).digest()
        with self._clear_errors():
            self._db = self._open(time.monotonic() + _BUSY_S)

    def get(self, groups: Sequence[TokenGroup]) -> list[list[float | None]]:
        """One value a response, None where it is not known; counts `hits` and `misses`."""
        keys = [self._keys(group) for group in groups]
        wanted = list(dict.fromkeys(key for row in keys for key in row))
        found: dict[bytes, float] = {}
        with self._clear_errors():
            for start in range(0, len(wanted), _KEYS_AT_ONCE):
                some = wanted[start : start + _KEYS_AT_ONCE]
                marks = ",".join("?" * len(some))
                found.update(self._db.execute(f"SELECT key, logp FROM logps WHERE key IN ({marks})", some))
        values = [[found.get(key) for key in row] for row in keys]
        known = sum(value is not None for row in values for value in row)
        self.hits += known
        self.misses += sum(map(len, values)) - known
        return values

    def put(self, groups: Sequence[TokenGroup], values: Sequence[Sequence[float]]) -> None:
        """Keep one value a response, in one transaction. A value that is not finite is not kept, nor one replaced."""
        rows = [
            (key, float(value))
            for group, row in zip(groups, values, strict=True)
            for key, value in zip(self._keys(group), row, strict=True)
            if math.isfinite(value)
        ]
        with self._clear_errors(), self._db:
            self._db.executemany("INSERT OR IGNORE INTO logps VALUES (?, ?)", rows)

    def _keys(self, group: TokenGroup) -> list[bytes]:
        """One SHA-256 a response. The prompt's length goes first, so that the border cannot move unnoticed."""
        start = hashlib.sha256(self._model)
        start.update(struct.pack(f"<Q{len(group.prompt_ids)}q", len(group.prompt_ids), *group.prompt_ids))
        keys = []
        for response in group.response_ids:
            key = start.copy()
            key.update(struct.pack(f"<{len(response)}q", *response))
            keys.append(key.digest())
        return keys

    def _open(self, deadline: float) -> sqlite3.Connection:
        while True:
            try:
                return self._connect()
            except sqlite3.OperationalError as error:
                # SQLite does not wait where two turn a new file to WAL at once: it refuses one of them.
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _connect(self) -> sqlite3.Connection:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        # A transaction takes the write lock when it begins: one that had to upgrade would not wait for others.
        # An actor's methods may run in another thread than its constructor; they never run at the same time.
        db = sqlite3.connect(
            self._path or ":memory:", timeout=_BUSY_S, isolation_level="IMMEDIATE", check_same_thread=False
        )
        # A write-ahead log needs memory that all processes share, which those of two machines do not.
        networked = self._path is not None and on_network(self._path)
        db.execute(f"PRAGMA journal_mode={'DELETE' if networked else 'WAL'}")
        db.execute("PRAGMA synchronous=NORMAL")  # a power cut may take the newest values, never the file
        db.execute("CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, logp REAL NOT NULL) WITHOUT ROWID")
        # Damage is noticed here or where it is read: to look for it in the whole file would take a start minutes.
        db.execute("SELECT key, logp FROM logps LIMIT 1").fetchall()
        return db

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, OSError) as error:
            what = " ".join(str(error).split())
            if isinstance(error, OSError) or getattr(error, "sqlite_errorcode", _DAMAGE[0]) & 0xFF not in _DAMAGE:
                raise RunError(
                    f"{self._path}: this cache of log-probs cannot be read and written ({what}); "
                    "it needs a disk with space that this user may write to; fleet.reference.cache says which"
                ) from error
            raise RunError(
                f"{self._path}: this cache of log-probs is damaged ({what}); remove it, and they are computed again"
            ) from error


def on_network(path: Path) -> bool:
    """Whether `path`, which need not be there, is on a file system that several machines may write to."""
    place = path.resolve()
    mounts = [one for one in psutil.disk_partitions(all=True) if place.is_relative_to(one.mountpoint)]
    kind = max(mounts, key=lambda one: len(one.mountpoint)).fstype if mounts else ""
    return kind in _NETWORK or kind.startswith("fuse.")


def model_fingerprint(directory: str, quantize: str | None = None) -> str:
    """SHA-256 (hex) of a model's weights, its config.json and its tokenizer's files, names and contents.

    Everything that log-probs of token ids, and the ids of a text, depend on; of chat templates only what
    tokenizer_config.json holds. Files are read in pieces. One that is quantised when it is loaded is another model.

    Raises:
        ModelError: no such directory, or no config.json or *.safetensors in it.
    """
    place = Path(directory)
    if not place.is_dir():
        raise ModelError(f"model {directory}: no such directory; give a model's (config.json, model.safetensors)")
    for pattern in ("config.json", "*.safetensors"):
        if not any(place.glob(pattern)):
            raise ModelError(f"model {directory}: there is no {pattern} in it; save the model with transformers")
    files = {file for pattern in (*_MODEL_FILES, *_TOKENIZER_FILES) for file in place.glob(pattern) if file.is_file()}
    whole = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as content:
            # Every file by its own digest: bytes that move from one to the next do not cancel out.
            whole.update(file.name.encode() + b"\0" + hashlib.file_digest(content, "sha256").digest())
    whole.update((quantize or "").encode())
    return whole.hexdigest()
