"""Numbers that were expensive to come by, in SQLite, by the digest of what they depend on.

Under `plumbline.models.logp_cache` and `plumbline.models.services`. Several processes may share a file; on a network's
file system, whose locks must work, those of several machines, which then wait for one another's writing.
"""

import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from plumbline.errors import RunError

_BUSY_S = 60.0  # how long a process waits for another one's writing
_KEYS_AT_ONCE = 500  # the oldest SQLite takes 999 parameters
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)  # the last: tables that are not ours
_NETWORK = set("nfs nfs4 cifs smb3 9p lustre gpfs beegfs ceph glusterfs virtiofs afs panfs".split())  # noqa: SIM905


class ValueCache:
    """A float64 a key, kept for good.

    Args:
        path: the SQLite file, made where there is none; None keeps everything in memory.
        table: what the values are called in the file.
        words: what they are called in messages.
        key: the key of the config that says where the file is, for messages.

    Raises:
        RunError: the file is damaged, or cannot be read and written. Every method may raise it.
    """

    def __init__(self, path: Path | None, table: str, words: str, key: str) -> None:
        self._path, self._table, self._words, self._key = path, table, words, key
        with self._clear_errors():
            self._db = self._open(time.monotonic() + _BUSY_S)

    def find(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """The values of those keys that are known."""
        wanted = list(dict.fromkeys(keys))
        found: dict[bytes, float] = {}
        with self._clear_errors():
            for start in range(0, len(wanted), _KEYS_AT_ONCE):
                some = wanted[start : start + _KEYS_AT_ONCE]
                marks = ",".join("?" * len(some))
                found.update(self._db.execute(f"SELECT * FROM {self._table} WHERE key IN ({marks})", some))
        return found

    def keep(self, values: Iterable[tuple[bytes, float]]) -> None:
        """Keep values, in one transaction. One that is not finite is not kept, nor one replaced."""
        rows = [(key, float(value)) for key, value in values if math.isfinite(value)]
        with self._clear_errors(), self._db:
            self._db.executemany(f"INSERT OR IGNORE INTO {self._table} VALUES (?, ?)", rows)

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
        db.execute(
            f"CREATE TABLE IF NOT EXISTS {self._table} (key BLOB PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID"
        )
        # Damage is noticed here or where it is read: to look for it in the whole file would take a start minutes.
        db.execute(f"SELECT key FROM {self._table} LIMIT 1").fetchall()
        return db

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, OSError) as error:
            what, cache = " ".join(str(error).split()), f"{self._path}: this cache of {self._words}"
            if isinstance(error, OSError) or getattr(error, "sqlite_errorcode", _DAMAGE[0]) & 0xFF not in _DAMAGE:
                raise RunError(
                    f"{cache} cannot be read and written ({what}); it needs a disk with space that this user may "
                    f"write to; {self._key} says which"
                ) from error
            raise RunError(f"{cache} is damaged ({what}); remove it, and it is filled again") from error


def on_network(path: Path) -> bool:
    """Whether `path`, which need not be there, is on a file system that several machines may write to."""
    place = path.resolve()
    mounts = [one for one in psutil.disk_partitions(all=True) if place.is_relative_to(one.mountpoint)]
    kind = max(mounts, key=lambda one: len(one.mountpoint)).fstype if mounts else ""
    return kind in _NETWORK or kind.startswith("fuse.")
