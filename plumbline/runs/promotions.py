"""Which version an alias means: the ledger of promotions of each policy, and the names that an endpoint answers to.

A version is published by its learner, proved by engines, and promoted by a gate, or by hand. Each change is a line of
``policies/NAME/promotions.jsonl`` with the version's digest; the last one stands. Whoever serves reads the file again,
so that a change by `plumbline promote` reaches a running endpoint too. It is an event of the run as well.
"""

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plumbline.errors import ModelError
from plumbline.records import PolicyRef, public_name
from plumbline.runs.disk import append_line
from plumbline.runs.policies import PROOF, check_files, proved_versions, read_digest, servable, version_directory

LEDGER = "promotions.jsonl"
By = Literal["gate", "proof", "hand", "rollback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """The alias of `ref`'s policy means this version from now on; `by` whom, and on which `figures`."""

    ref: PolicyRef
    by: By
    figures: Mapping[str, Any] = field(default_factory=dict)


def ledger_path(run_dir: Path, policy: str) -> Path:
    """Where the promotions of a policy are noted."""
    return run_dir / "policies" / policy / LEDGER


def promote(run_dir: Path, promotion: Promotion) -> None:
    """Note that an alias moves.

    Raises:
        ModelError: there is no such version, with what proves it, or its files are not whole.
        DiskError: it cannot be noted.
    """
    ref = promotion.ref
    if ref.version and not (version_directory(run_dir, ref) / PROOF).is_file():
        there = proved_versions(run_dir, ref.policy)
        known = f"{there[0]} to {there[-1]}" if there else "none"
        raise ModelError(f"{run_dir}: no version {ref} to promote; there are {known}")
    line = {"time": time.time(), "version": ref.version, "by": promotion.by, "figures": dict(promotion.figures)}
    if ref.version:
        check_files(run_dir, ref)
        line["digest"] = read_digest(run_dir, ref)
    append_line(ledger_path(run_dir, ref.policy), json.dumps(line), sync=True)
    event = {"pipeline": "serve", "policy": ref.policy, **line}
    append_line(run_dir / "events.jsonl", json.dumps(event), sync=True)


def rollback(run_dir: Path, policy: str) -> PolicyRef:
    """Move an alias back to the version that it meant before; returns that.

    Raises:
        ModelError: there is none before it.
    """
    past = promoted(run_dir, policy)
    if len(past) < 2:
        raise ModelError(f"{run_dir}: {policy} has no earlier promotion to go back to; name one: plumbline promote")
    ref = PolicyRef(policy=policy, version=past[-2])
    promote(run_dir, Promotion(ref=ref, by="rollback"))
    return ref


def promoted(run_dir: Path, policy: str) -> list[int]:
    """Versions that the alias has meant, the present one last; one that was rolled back is left out.

    Raises:
        ModelError: a line of the ledger is none.
    """
    return [entry.version for entry in _promotions(run_dir, policy)]


def spared(run_dir: Path, policy: str) -> set[int]:
    """Versions that are not to be pruned: that a gate or a person promoted, and the last two of those that a proof
    alone did, which is every one."""
    past = _promotions(run_dir, policy)
    return {entry.version for entry in past if entry.by != "proof"} | {entry.version for entry in past[-2:]}


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of a ledger; it has no `digest` where it is of version 0, or of a run that was older than digests."""

    version: int
    by: By
    digest: str | None


def _promotions(run_dir: Path, policy: str) -> list[_Entry]:
    path = ledger_path(run_dir, policy)
    if not path.exists():
        return []
    return _LEDGERS.setdefault(path, _Ledger(path)).read_on()


class _Ledger:
    """What a file of promotions says, read on where it has grown: a step and a request ask for it each time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reading = threading.Lock()
        self._forget()

    def read_on(self) -> list[_Entry]:
        """What it says now, the present version last. Raises ModelError: a line of it is none."""
        with self._reading, self._path.open("rb") as file:
            file.seek(max(0, self._read - len(self._end)))
            if os.fstat(file.fileno()).st_ino != self._file or file.read(len(self._end)) != self._end:
                self._forget()  # it is another one, or was written anew
                self._file = os.fstat(file.fileno()).st_ino
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):  # of a process that was killed while it wrote, or is writing
                    break
                self._add(line)
                self._read += len(line)
                self._lines += 1
                self._end = line[-64:]
            return list(self._stack)

    def _forget(self) -> None:
        self._stack: list[_Entry] = []
        self._read, self._lines, self._file, self._end = 0, 0, 0, b""

    def _add(self, line: bytes) -> None:
        try:
            read = json.loads(line)
            entry = _Entry(int(read["version"]), read["by"], read.get("digest"))
        except (ValueError, KeyError, TypeError):
            raise ModelError(f"{self._path}: line {self._lines + 1} is no promotion; remove it") from None
        stack = self._stack
        if entry.by == "rollback" and len(stack) > 1:
            stack.pop()
        elif not stack or stack[-1].version != entry.version:
            stack.append(entry)
        else:
            stack[-1] = entry  # by hand what a proof had promoted, or made anew since


_LEDGERS: dict[Path, _Ledger] = {}


def policy_named(run_dir: Path, name: str) -> str:
    """The policy that users call `name`. Raises ModelError naming what there is."""
    there = {public_name(policy): policy for policy in servable(run_dir)}
    if public_name(name) not in there:
        known = ", ".join(there) or "none yet"
        raise ModelError(f"{run_dir}: no policy {name!r}; there are: {known}")
    return there[public_name(name)]


class Catalog:
    """The model names that an endpoint answers to: `base`, an alias a policy, and `ple@12`.

    Names are looked up among these and never become part of a path. ``self-contrast`` is ``self_contrast`` too. An
    alias whose version is not here means nothing, never another version.

    Args:
        policies: those of a live run, whose aliases mean π0 until something is promoted; None: what `run_dir` holds,
            whose aliases mean the newest version where nothing was ever promoted.
    """

    def __init__(self, run_dir: Path | None, policies: Sequence[str] | None = None) -> None:
        self._run_dir = run_dir
        self._live = policies is not None
        found = policies if policies is not None else (servable(run_dir) if run_dir else [])
        self._policies = {public_name(policy): policy for policy in found}
        self._digests: dict[PolicyRef, tuple[tuple[int, int, int], str]] = {}

    def resolve(self, name: str) -> PolicyRef:
        """Which version answers to `name` now.

        Raises:
            KeyError: there is no such name.
            ModelError: there is, but what it means is not here; which is an operator's to mend.
        """
        if name == "base":
            return PolicyRef()
        alias, at, number = name.partition("@")
        policy = self._policies.get(public_name(alias))
        if policy is None:
            raise KeyError(name)
        if not at:
            return PolicyRef(policy=policy, version=self._current(policy))
        if not (number.isascii() and number.isdigit() and len(number) < 10) or int(number) not in self._there(policy):
            raise KeyError(name)
        return PolicyRef(policy=policy, version=int(number))

    def digest(self, ref: PolicyRef) -> str:
        """What the weights of a version are known by, whatever was known by its name before; "" of version 0.

        Raises:
            ModelError: its proof cannot be read.
        """
        if ref.version == 0:
            return ""
        assert self._run_dir is not None
        try:
            there = (version_directory(self._run_dir, ref) / PROOF).stat()
        except OSError:
            raise ModelError(f"{self._run_dir}: {ref.policy} has lost its version {ref.version}") from None
        stamp = (there.st_mtime_ns, there.st_size, there.st_ino)
        if self._digests.get(ref, (None, ""))[0] != stamp:
            self._digests[ref] = stamp, read_digest(self._run_dir, ref)
        return self._digests[ref][1]

    def aliases(self) -> dict[str, PolicyRef | None]:
        """Base and every alias, with what they mean now; None where that is not here."""
        found: dict[str, PolicyRef | None] = {"base": PolicyRef()}
        for name in self._policies:
            try:
                found[name] = self.resolve(name)
            except ModelError:
                found[name] = None
        return found

    def pinned(self) -> list[str]:
        """Names of all versions that there are."""
        return [f"{name}@{v}" for name, policy in self._policies.items() for v in self._there(policy)]

    def _there(self, policy: str) -> list[int]:
        assert self._run_dir is not None
        return proved_versions(self._run_dir, policy)

    def _current(self, policy: str) -> int:
        assert self._run_dir is not None
        if not (self._run_dir / "config.yaml").is_file():
            raise ModelError(f"{self._run_dir}: the run's directory is not on this machine, or not whole")
        there, past = self._there(policy), _promotions(self._run_dir, policy)
        meant = past[-1].version if past else 0 if self._live else max(there, default=None)
        if meant is None or meant not in (0, *there):
            what = f"the version {meant} that it means" if meant is not None else "any version"
            raise ModelError(f"{self._run_dir}: {policy} has lost {what}: it is not there with its proof")
        if past and past[-1].digest not in (None, self.digest(PolicyRef(policy=policy, version=meant))):
            raise ModelError(
                f"{self._run_dir}: {policy}@{meant} is not what was promoted: it was made anew, or replaced; "
                f"`plumbline promote {self._run_dir} {public_name(policy)}@{meant}` promotes what is there now"
            )
        return meant
