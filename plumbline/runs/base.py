"""What a run starts from where its config names an adapter: both merged, once, in the run's directory.

The model that was made stays the run's, here and in its storage: made anew on another processor it could differ in its
last bits, and pairs, log-probs and versions are of this very one.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from plumbline.config.data import Model
from plumbline.config.tree import Config
from plumbline.data.tokenizer import read_tokenizer
from plumbline.errors import ModelError
from plumbline.models.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from plumbline.models.logp_cache import model_fingerprint
from plumbline.runs.checkpoint import write_directory
from plumbline.runs.policies import MERGED, SOURCES
from plumbline.runs.storage import Storage


def check_merged(config: Config, run_dir: Path) -> None:
    """Raises ModelError where what is merged in `run_dir` was made of another adapter or base than is there now."""
    kept = run_dir / MERGED / SOURCES
    if config.model.adapter is None or not kept.is_file():
        return
    now = _digests(config.model)
    for key, digest in json.loads(kept.read_text("utf-8")).items():
        if now[key] != digest:
            raise ModelError(
                f"model.{key}: {getattr(config.model, key)}: other files than when the run in {run_dir} began, "
                "which starts from them; put them back, or start anew with another `name` or --run-dir"
            )


def with_base(config: Config, run_dir: Path, storage: Storage, say: Callable[[str], None]) -> Config:
    """The config by which a run's processes are started: with the merged model as its own, made where it is not there.

    Args:
        run_dir: opened for this run alone.
        say: tells the user what takes a while.

    Raises:
        ModelError: as `check_merged`, or adapter and base cannot be merged.
        DiskError: there is no room for it.
        RunError: the storage failed.
    """
    model, target = config.model, run_dir / MERGED
    if model.adapter is None:
        return config
    storage.pull_directory(target, SOURCES)
    check_merged(config, run_dir)
    if not (target / SOURCES).is_file():
        say("merging the adapter into the base")
        write_directory(target, lambda aside: _merge(model, aside))
    if storage.url and SOURCES not in storage.sizes(target):
        storage.push_directory(target, SOURCES)
    return config.model_copy(update={"model": model.at(str(target))})


def _merge(model: Model, aside: Path) -> None:
    from plumbline.models.merging import merge_adapter

    assert model.adapter is not None and model.path is not None
    sources = _digests(model)  # before they are read: whoever replaces one meanwhile is told when the run goes on
    merge_adapter(model.adapter, model.path, aside)
    read_tokenizer(model.tokenizer_path).save_pretrained(aside)
    (aside / SOURCES).write_text(json.dumps(sources), encoding="utf-8")


def _digests(model: Model) -> dict[str, str]:
    """Of the files that are merged, by their keys in `model`."""
    assert model.adapter is not None and model.path is not None
    whole = hashlib.sha256()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        with (Path(model.adapter) / name).open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return {"path": model_fingerprint(model.path), "adapter": whole.hexdigest()}
