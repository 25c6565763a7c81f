"""What a run keeps in its storage (`storage_path`), from which another machine resumes it.

One side may only be ahead of the other, which the parts tell, the ledger of the run: who is behind is brought up, and
two that have gone apart are refused. Called by the start and the end of a run, and by learners for their checkpoints.
"""

import contextlib
import posixpath
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from plumbline.config.file import dump_config, parse_text
from plumbline.config.tree import Config
from plumbline.errors import ConfigError, RunError, in_one_line
from plumbline.models.files import ADAPTER_CONFIG
from plumbline.records import PolicyRef
from plumbline.runs.checkpoint import KEPT, MARKER, checkpoint_directory, latest_step, listed
from plumbline.runs.directory import check_same
from plumbline.runs.policies import PROOF, proved_versions, version_directory, versions
from plumbline.runs.promotions import LEDGER, spared
from plumbline.runs.storage import Storage, below, complete_in, redacted

_LOG = re.compile(r"events\.jsonl|policies/[^/]+/promotions\.jsonl")  # lines are added to these
_RESULT = re.compile(r"probe\.json|evaluation\.json|report\.html|rows\.parquet|origin\.json|evaluated/[^/]+\.parquet")
_PART = re.compile(r"(?:rollouts|pairs)/[^/]+/step-\d+\.parquet")
_REJECTED = re.compile(r"((?:rollouts|pairs)/[^/]+/)rejected\.parquet/(step-\d+\.parquet)")
_BEFORE = "step-000000.parquet"  # what was rejected before the first step: there is no such part


def run_storage(config: Config, run_dir: Path) -> Storage:
    """The storage of a run: `storage_path/NAME`, or one that does nothing. Raises ConfigError: it cannot be opened."""
    return Storage(run_dir, posixpath.join(config.storage_path, config.name) if config.storage_path else None)


def check_storage(config: Config, run_dir: Path) -> str:
    """Whether the storage can be written, and holds this run or nothing of its name; returns what was seen.

    Raises:
        ConfigError: it cannot be written, or holds another config, or something else.
    """
    storage = run_storage(config, run_dir)
    if storage.url is None:
        return "none, the run directory is the only copy"
    try:
        storage.check()
        text = storage.read_text(run_dir / "config.yaml")
        empty = text is None and not storage.sizes(run_dir)
    except RunError as error:
        reason = redacted(in_one_line(error.__cause__ or error))
        raise ConfigError(
            f"storage_path: {storage.url}: {reason}; it must be there and let itself be written"
        ) from None
    if text is not None:
        starts = "another `name` or `storage_path` starts anew"
        check_same(parse_text(text, f"{storage.url}/config.yaml"), config, storage.url, starts)
    elif not empty:
        raise ConfigError(f"storage_path: {storage.url}: exists and is no run's; give another `name` or `storage_path`")
    return f"{storage.url} {'holds nothing yet' if text is None else 'holds this run'}"


def open_storage(config: Config, run_dir: Path) -> Storage:
    """The storage of a run whose directory is open, both brought to the same state.

    Pulled is what the local directory lacks, but checkpoints: a learner pulls its own. Pushed is what the storage
    lacks, as after it had failed.

    Raises:
        ConfigError: both have parts that the other has not, or unlike ones.
        RunError: the storage failed.
    """
    storage = run_storage(config, run_dir)
    if storage.url is None:
        return storage
    # Paths in the working directory are kept relative: another machine, or another job, has that elsewhere.
    storage.write_text(run_dir / "config.yaml", dump_config(config, within=Path.cwd()))
    there = storage.sizes(run_dir)
    _exchange_parts(storage, run_dir, there)
    _exchange_logs(storage, run_dir, there)
    _pull_versions(storage, run_dir, below(there, "policies"))
    for policy in (child.name for child in run_dir.glob("policies/*") if child.is_dir()):
        lacking = set(versions(run_dir, policy)) - complete_in(below(there, f"policies/{policy}"), PROOF).keys()
        refs = [PolicyRef(policy=policy, version=version) for version in sorted(lacking)]
        storage.push_new_directories([version_directory(run_dir, ref) for ref in refs], PROOF)
    for checkpoints in run_dir.glob("checkpoints/*"):
        newest = latest_step(checkpoints)
        if newest > max(complete_in(below(there, f"checkpoints/{checkpoints.name}"), MARKER), default=0):
            push_checkpoint(storage, checkpoints, newest)
    return storage


@contextlib.contextmanager
def pushed_at_end(storage: Storage, run_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Whatever the end: what lines were added to, and results, are in the storage. Raises RunError where it failed."""
    try:
        yield
    except BaseException:
        try:
            push_logs(storage, run_dir)
        except RunError as error:  # why the run ended says more
            say(str(error))
        raise
    push_logs(storage, run_dir)


def push_logs(storage: Storage, run_dir: Path) -> None:
    """Push what has changed of the files that are no parts, checkpoints or versions."""
    files = sorted([*run_dir.glob("*"), *run_dir.glob("evaluated/*"), *run_dir.glob(f"policies/*/{LEDGER}")])
    names = [file.relative_to(run_dir).as_posix() for file in files]
    storage.push_together(run_dir / name for name in names if _LOG.fullmatch(name) or _RESULT.fullmatch(name))


def saved_step(storage: Storage, checkpoints: Path) -> int:
    """Step of the newest checkpoint: in the storage, which all machines see, or locally without one; 0 for none."""
    return max(storage.complete(checkpoints, MARKER), default=0) if storage.url else latest_step(checkpoints)


def push_checkpoint(storage: Storage, checkpoints: Path, step: int) -> None:
    """Push a checkpoint that is here whole: its files, then as `seal_checkpoint`."""
    directory = checkpoint_directory(checkpoints, step)
    if storage.url:
        storage.push_together(directory / name for name in listed((directory / MARKER).read_text("utf-8")))
    seal_checkpoint(storage, checkpoints, step)


def seal_checkpoint(storage: Storage, checkpoints: Path, step: int) -> None:
    """Push the manifest of a checkpoint whose files were pushed, and remove old ones there as here."""
    storage.push(checkpoint_directory(checkpoints, step) / MARKER)
    storage.keep_newest(checkpoints, MARKER, KEPT)


def pull_checkpoint(storage: Storage, checkpoints: Path, step: int) -> None:
    """Pull what is not here of a checkpoint: of one that workers on several machines wrote, each has its own files.

    The storage's manifest is the one that counts. Several processes may ask at once.
    """
    directory = checkpoint_directory(checkpoints, step)
    with storage.pulling():
        manifest = storage.read_text(directory / MARKER)
        if manifest is not None:
            storage.pull(*(directory / name for name in listed(manifest) if not (directory / name).exists()))
            storage.pull(directory / MARKER)


def pull_parts(storage: Storage, run_dir: Path, directory: Path) -> None:
    """Pull the parts in `directory` that are not here. Several processes may ask at once."""
    if storage.url is None:
        return
    prefix = directory.relative_to(run_dir).as_posix()
    with storage.pulling():
        names = (name for name in sorted(storage.sizes(directory)) if _PART.fullmatch(f"{prefix}/{name}"))
        storage.pull(*(directory / name for name in names if not (directory / name).exists()))


def pull_versions(storage: Storage, run_dir: Path) -> None:
    """Pull the published versions that are not here: all adapters, and of whole models the newest."""
    _pull_versions(storage, run_dir, storage.sizes(run_dir / "policies"))


def made_versions(storage: Storage, run_dir: Path, policy: str, since: int) -> set[int]:
    """Versions of a policy from `since` on that are whole, here or in the storage."""
    there = storage.complete(run_dir / "policies" / policy, PROOF)
    return {version for version in {*proved_versions(run_dir, policy), *there} if version >= since}


def settle_version(storage: Storage, run_dir: Path, ref: PolicyRef) -> None:
    """Have here and the storage hold the same of a version that either has whole: the storage's, where it has it,
    for that is what others saw."""
    directory = version_directory(run_dir, ref)
    proof = storage.read_text(directory / PROOF)
    if proof is None:
        storage.push_directory(directory, PROOF)
    elif not directory.is_dir() or (directory / PROOF).read_text("utf-8") != proof:
        shutil.rmtree(directory, ignore_errors=True)
        storage.pull_directory(directory, PROOF)


def prune_versions(
    storage: Storage, run_dir: Path, policy: str, step: int, keep: int, used: Collection[int] = ()
) -> None:
    """Remove old versions of a policy, here and in the storage.

    Args:
        step: the version that the run has come to; those after it, of a learner that is ahead, stay.
        keep: how many stay, counted from that one.
        used: others that stay, beside those that `plumbline.runs.promotions.spared` has.
    """
    root = run_dir / "policies" / policy
    there = storage.complete(root, PROOF)
    known = sorted(version for version in {*versions(run_dir, policy), *there} if version <= step)
    for version in set(known[:-keep]) - {*used, *spared(run_dir, policy)}:
        directory = version_directory(run_dir, PolicyRef(policy=policy, version=version))
        if version in there:
            storage.remove(directory, PROOF)
        shutil.rmtree(directory, ignore_errors=True)


def _pull_versions(storage: Storage, run_dir: Path, names: Mapping[str, int]) -> None:
    """As `pull_versions`, of whose storage `names` is the listing."""
    for policy in sorted({name.partition("/")[0] for name in names}):
        root, own = run_dir / "policies" / policy, below(names, policy)
        complete = complete_in(own, PROOF)
        kept = {n: d for n, d in complete.items() if n == max(complete) or f"{d}/{ADAPTER_CONFIG}" in own}
        files: dict[Path, list[str]] = {root / directory: [] for directory in kept.values()}
        for name in own:
            directory, _, file = name.partition("/")
            if root / directory in files:
                files[root / directory].append(file)
        storage.pull_directories(files, PROOF)


def _exchange_parts(storage: Storage, run_dir: Path, there: Mapping[str, int]) -> None:
    files = (path for path in run_dir.glob("*/*/**/*.parquet") if path.is_file())
    here = {path.relative_to(run_dir).as_posix(): path.stat().st_size for path in files}
    parts_there, parts_here = ({n for n in side if _PART.fullmatch(n)} for side in (there, here))
    new, unlike = parts_there - parts_here, {n for n in parts_there & parts_here if there[n] != here[n]}
    if unlike or (new and parts_here - parts_there):
        first = min(unlike or new)
        raise ConfigError(
            f"{run_dir} and {storage.url} have gone apart (the first to differ is {first}): another run continued the "
            f"storage's; `plumbline run CONFIG --run-dir DIR` with a new directory goes on from there, another `name` "
            "keeps both"
        )
    added = parts_here - parts_there
    # A step that was cut short between its rejections and its part is drawn again, and may then reject none.
    rejected_there, rejected_here = _rejected(there), _rejected(here)
    whole_there, whole_here = {*parts_there, _BEFORE}, {*parts_here, _BEFORE}
    storage.discard(run_dir / name for name, part in rejected_there.items() if part not in whole_there)
    for name in (name for name, part in rejected_here.items() if part not in whole_here):
        (run_dir / name).unlink()
    # Rejections go before their parts, in both directions.
    pulled = (
        name for name, part in rejected_there.items() if part in whole_there and (part in new or name not in here)
    )
    pushed = (name for name, part in rejected_here.items() if part in added or (part == _BEFORE and name not in there))
    for names in (pulled, new):
        storage.pull(*(run_dir / name for name in sorted(names)))
    for names in (pushed, added):
        storage.push_together(run_dir / name for name in sorted(names))


def _rejected(names: Collection[str]) -> dict[str, str]:
    """The files of rejections among `names`, each with the part of its step, or `_BEFORE`."""
    found = (match for name in names if (match := _REJECTED.fullmatch(name)))
    return {match[0]: match[2] if match[2] == _BEFORE else match[1] + match[2] for match in found}


def _exchange_logs(storage: Storage, run_dir: Path, there: Mapping[str, int]) -> None:
    """Of files that lines are added to, the longer one is the newer; results stay where there are any."""
    kept = {name: size for name, size in there.items() if _LOG.fullmatch(name) or _RESULT.fullmatch(name)}
    missing = [name for name in kept if not (run_dir / name).exists()]
    logs = (name for name in kept if name not in missing and _LOG.fullmatch(name))
    shorter = (name for name in logs if (run_dir / name).stat().st_size < kept[name])
    storage.pull(*(run_dir / name for name in (*missing, *shorter)))
    push_logs(storage, run_dir)
