"""Models by their names on the Hugging Face hub: which commit a name means, and the directory of the hub's cache that
holds it. What reads models sees directories alone; a run's config.yaml keeps the names, and the commits in `commits`.

A model that lies in the cache is used from there, whatever its branch has come to; another one is downloaded: weights
in safetensors, tokenizer and configs, no pickles and no code.
"""

from pathlib import Path

from plumbline.config.file import load_config, parse_text
from plumbline.config.hub import HubModel, Kind, at_directories, hub_models, is_hub_name
from plumbline.config.tree import Config
from plumbline.data.tokenizer import TOKENIZER_FILES
from plumbline.errors import ModelError, in_one_line
from plumbline.runs.gguf import is_gguf, made_directory
from plumbline.runs.mirror import run_storage
from plumbline.submitted import left_out

WEIGHTS = "*.safetensors"
FILES = (
    "*.json",
    "*.jinja",
    "*vocab.txt",
    "*merges.txt",
    "*tokenizer.model",
    "*spiece.model",
    "*.bpe.model",
    "*.tiktoken",
)
LEFT_OUT = ("*.bin.index.json", "*consolidated*", "onnx/*", "openvino/*")
"""Indices of pickles, weights that are there twice, and other formats' settings."""


def pinned(config: Config, run_dir: Path) -> Config:
    """The config with the commit of every model that it names: those of the run that it continues, here or in its
    storage, else what the cache has, else what the hub says. Nothing but small files is read.

    Raises:
        ModelError: a model cannot be had.
        ConfigError, RunError: what is kept of the run cannot be read.
    """
    lacking = [one for one in hub_models(config) if one.label not in config.commits]
    if not lacking:
        return config
    commits = {**_kept(config, run_dir), **config.commits}
    for one in lacking:
        if one.label not in commits:
            commits[one.label] = _commit(one)
    return config.model_copy(update={"commits": {one.label: commits[one.label] for one in hub_models(config)}})


def converted(config: Config) -> Config:
    """A config with what a GGUF file is made into in its place. Raises ModelError and DiskError."""
    path = config.model.path
    if path is None or not is_gguf(path):
        return config
    return at_directories(config, {"model.path": made_directory(path, "model.path")})


def fetched(config: Config) -> Config:
    """A pinned config with a directory of the cache in place of every name, downloaded where it is not there whole, and
    of a GGUF file.

    Raises:
        ModelError: a model cannot be had.
    """
    config = converted(config)
    models = hub_models(config)
    return at_directories(config, {one.key: _directory(one, config.commits[one.label]) for one in models})


def named_model(name: str, key: str) -> str:
    """The directory of a model that a command is given: of ORG/MODEL or ORG/MODEL@REVISION in the cache, downloaded
    where it is not there; of what a GGUF file is made into; of anything else as it is. Raises ModelError naming `key`.
    """
    if is_gguf(name):
        return made_directory(name, key)
    path, _, revision = name.partition("@")
    if Path(name).exists() or not is_hub_name(path):
        return name
    one = HubModel(key, "model", path, revision or None)
    return _directory(one, _commit(one))


def _kept(config: Config, run_dir: Path) -> dict[str, str]:
    if (run_dir / "config.yaml").exists():
        return load_config(run_dir / "config.yaml").commits
    storage = run_storage(config, run_dir)
    text = storage.read_text(run_dir / "config.yaml")
    return parse_text(text, f"{storage.url}/config.yaml").commits if text else {}


def _commit(one: HubModel) -> str:
    """What a name means now. Raises ModelError."""
    from huggingface_hub import HfApi

    if there := _here(one, one.revision):
        return there.name
    try:
        commit = HfApi().resolve_revision(one.name, revision=one.revision).resolved
        listed = [file.rfilename for file in HfApi().model_info(one.name, revision=commit).siblings or []]
    except Exception as error:  # huggingface_hub raises a dozen kinds, its own, httpx's and OSError
        raise ModelError(_refusal(one, one.revision, error)) from error
    if one.kind != "tokenizer" and not any(Path(file).match(WEIGHTS) for file in listed):
        raise ModelError(
            f"{_told(one)}: no {WEIGHTS} in it on the hub; name a revision that has them, or load it with transformers "
            "and save it, and give that directory"
        )
    return commit


def _directory(one: HubModel, commit: str) -> str:
    """Where a commit of a model lies whole. Raises ModelError."""
    from huggingface_hub import constants

    try:
        found = _snapshot(one, commit)
    except Exception as error:  # as above
        if there := _here(one, commit):  # which the hub may have no more
            return str(there)
        raise ModelError(_refusal(one, commit, error)) from error
    if not _is_model(found, one.kind):  # another program had the hub send less, and nobody can be asked now
        what = "tokenizer" if one.kind == "tokenizer" else WEIGHTS
        reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{constants.ENDPOINT} did not answer"
        raise ModelError(f"{_told(one)}: no {what} in {found}, and {reason}; fetch it by: {_command(one, commit)}")
    return str(found)


def _here(one: HubModel, revision: str | None) -> Path | None:
    """A revision's directory in the cache, if that has it whole, as far as can be told without the hub."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        there = _snapshot(one, revision, here=True)
    except LocalEntryNotFoundError:
        return None
    return there if _is_model(there, one.kind) else None


def _snapshot(one: HubModel, revision: str | None, *, here: bool = False) -> Path:
    """A revision's directory in the cache. What is not there is downloaded, unless it has to be `here`."""
    from huggingface_hub import snapshot_download

    allowed = [*FILES, *([] if one.kind == "tokenizer" else [WEIGHTS])]
    left_out = [*LEFT_OUT, *([] if one.kind == "embedder" else ["*/*"])]  # an embedder's modules lie in folders
    found = snapshot_download(
        one.name, revision=revision, local_files_only=here, allow_patterns=allowed, ignore_patterns=left_out
    )
    return Path(found)


def _is_model(directory: Path, kind: Kind) -> bool:
    if kind == "tokenizer":
        return any((directory / name).exists() for name in TOKENIZER_FILES)
    return any(directory.rglob(WEIGHTS))


def _told(one: HubModel) -> str:
    return f"{one.key}: {one.label}"


def _command(one: HubModel, revision: str | None) -> str:
    return f"hf download {one.name}{f' --revision {revision}' if revision else ''}"


def _refusal(one: HubModel, revision: str | None, error: Exception) -> str:
    """Why a model could not be had, and what would help."""
    from huggingface_hub import constants, errors

    told, page = _told(one), f"{constants.ENDPOINT}/{one.name}"
    token = "a token (`hf auth login`, or HF_TOKEN)"
    if constants.is_offline_mode():
        return (
            f"{told}: no such directory, not whole in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; "
            f"unset it, or where there is a network: {_command(one, revision)}{left_out(one.name)}"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"{told}: gated; ask for access on {page}, and give {token} of whoever has it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{told}: neither a directory here nor a model on {constants.ENDPOINT}; mend the name, or give {token} if "
            f"it is a private one{left_out(one.name)}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{told}: no revision {revision!r} on {page}; name one of its branches, tags or commits"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{told}: {constants.ENDPOINT} refused it ({error.response.status_code}); try again, or give {token}"
    cause = error.__cause__ if isinstance(error, errors.RevisionResolutionError | errors.EntryNotFoundError) else error
    reason = in_one_line(cause or error)
    return (
        f"{told}: no such directory, not whole in the cache {constants.HF_HUB_CACHE}, and not to be had from "
        f"{constants.ENDPOINT} ({reason}); mend that, or where there is a network: {_command(one, revision)}"
        f"{left_out(one.name)}"
    )
