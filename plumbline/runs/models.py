"""Every model that a run reads, looked at before anything of the run starts: its files, the names and shapes in them,
its vocabulary, its numbers. Called by `plumbline.doctor`, and by `plumbline evaluate` for model directories.

What takes longest to import comes last: a directory that is not there is told at once.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from plumbline.config.data import ClassifierReward
from plumbline.config.pipelines import RewardModel
from plumbline.config.tree import Config
from plumbline.data.tokenizer import read_tokenizer, run_tokenizer
from plumbline.errors import ModelError
from plumbline.models.files import (
    CONFIG,
    Stored,
    adapter_files,
    first_not_finite,
    model_files,
    model_type,
    read_headers,
    size_of,
)
from plumbline.runs.gguf import made_from
from plumbline.runs.policies import model_path
from plumbline.submitted import left_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
"""How long values are looked at; the rest is looked at when it is loaded."""
EMBEDDER = "embedder.path"


def check_base(config: Config) -> tuple[str, "PreTrainedTokenizerBase"]:
    """The model that the run starts from, and its tokenizer. Raises ModelError, or ConfigError of a policy that it
    cannot have."""
    path = config.model.path
    stored = {} if path is None else model_files(path, "model.path")

    from plumbline.models.adapters import check_policies

    if path is not None:
        trains = any(isinstance(one, RewardModel) for one in config.pipelines)
        speaks = config.sft is not None or not all(isinstance(one, RewardModel) for one in config.pipelines)
        speaks = speaks or config.model.adapter is not None  # which is merged into a causal language model
        _check_names(path, "model.path", stored, causal=speaks, new_classifier=trains)
    check_policies(config)
    tokenizer = run_tokenizer(config)
    if path is not None:
        _check_vocabulary(tokenizer, path, "model.path")
    return _told(config), tokenizer


def _told(config: Config) -> str:
    """What the run starts from. Raises ModelError of an adapter that does not fit its base."""
    path, adapter = config.model.path, config.model.adapter
    if path is None:
        return "random weights"
    if adapter is None:
        made = made_from(path)
        return f"{model_type(path)} in {path}{f' ({made})' if made else ''}"

    from plumbline.models.merging import check_adapter

    return f"{model_type(path)} in {path} {check_adapter(adapter, path)}"


def check_causal(path: str, key: str) -> None:
    """A directory as a causal language model with its tokenizer. Raises ModelError naming `key`."""
    stored = model_files(path, key)
    _check_names(path, key, stored, causal=True)
    _check_vocabulary(read_tokenizer(path), path, key)
    check_finite([(key, path, stored)])


def check_classifier(path: str, key: str) -> str:
    """A directory as a reward. Raises ModelError naming `key`."""
    stored = model_files(path, key)
    settings = json.loads((Path(path) / CONFIG).read_text("utf-8"))
    kinds = settings.get("architectures") or []
    if not any("SequenceClassification" in kind for kind in kinds):
        is_a = ", ".join(kinds) or "of no architecture"
        raise ModelError(f"{key}: {path}: no sequence classifier (it is {is_a}); a `reward` pipeline trains one")
    if (labels := len(settings.get("id2label") or (0, 1))) > 2:
        raise ModelError(f"{key}: {path}: a classifier of {labels} labels; a reward has 1 or 2")

    _check_names(path, key, stored, classifier=True)
    _check_vocabulary(read_tokenizer(path), path, key)
    return f"{model_type(path)} in {path}"


def check_embedder(path: str) -> str:
    """A directory as a sentence-transformers model. Raises ModelError."""
    for folder, kind, stored in embedder_parts(path):
        if kind == "Transformer":
            check_body(str(folder), stored)
            _check_vocabulary(read_tokenizer(str(folder)), str(folder), EMBEDDER)
    return path


def embedder_parts(path: str) -> Iterator[tuple[Path, str, dict[str, Stored]]]:
    """Folder, kind and tensors of each module of a sentence-transformers model that has any. Its own list of them must
    be there: without it a pooling would be guessed.

    Raises:
        ModelError: it is none, or a file is not there or damaged.
    """
    directory, listed = Path(path), Path(path) / "modules.json"
    if not directory.is_dir():
        raise ModelError(f"{EMBEDDER}: {path}: no such directory; give a sentence-transformers model's{left_out(path)}")
    if not listed.is_file():
        raise ModelError(f"{EMBEDDER}: {path}: no sentence-transformers model: there is no modules.json in it")
    try:
        modules = [(directory / str(one["path"]), str(one["type"])) for one in json.loads(listed.read_text("utf-8"))]
    except (ValueError, TypeError, KeyError):
        raise ModelError(f"{EMBEDDER}: {listed}: no list of modules with `path` and `type`; copy it again") from None
    for folder, kind in modules:
        name = kind.rpartition(".")[2]
        if name == "Transformer":
            yield folder, name, model_files(str(folder), EMBEDDER)
        elif files := sorted(folder.glob("*.safetensors")):
            yield folder, name, read_headers(files, EMBEDDER)


def check_body(path: str, stored: Mapping[str, Stored]) -> None:
    """A transformers model without a head, as embedders read it. Raises ModelError."""
    from transformers import AutoModel

    from plumbline.models.loading import check_names

    check_names(AutoModel, path, EMBEDDER, stored, "none")


def check_values(config: Config) -> str:
    """Whether the numbers of all models are finite; what was seen. Files that are damaged are named by others.

    Raises:
        ModelError: some are not.
    """
    found = []
    for key, path, read in _all_files(config):
        with contextlib.suppress(ModelError):
            found.append((key, path, read()))
    return check_finite(found)


Files = dict[str, Stored]


def check_finite(models: Sequence[tuple[str, str, Files]], seconds: float = SECONDS) -> str:
    """See `check_values`; of models by key and path, as far as can be looked at in so many seconds."""
    deadline, seen = time.monotonic() + seconds, 0
    for key, path, stored in models:
        name, looked = first_not_finite(stored, deadline)
        if name:
            wrong = f"{name} has values that are no finite numbers"
            raise ModelError(f"{key}: {path}: {wrong}; it was damaged, or diverged")
        seen += looked
    total = sum(size_of(stored) for *_, stored in models)
    if seen < total:
        return f"finite in {seen / 2**30:.1f} of {total / 2**30:.1f} GiB; the rest is looked at when it is loaded"
    return f"all finite, {total / 2**30:.1f} GiB" if total else "none to read"


def _all_files(config: Config) -> Iterator[tuple[str, str, Callable[[], Files]]]:
    """Key, path and reader of every model of a run."""
    if config.model.path is not None:
        yield "model.path", config.model.path, partial(model_files, config.model.path, "model.path")
    if config.model.adapter is not None:
        yield "model.adapter", config.model.adapter, partial(adapter_files, config.model.adapter, "model.adapter")
    for key, reward in config.rewards.items():
        if isinstance(reward, ClassifierReward):
            path = model_path(reward.path)
            yield f"{key}.path", path, partial(model_files, path, f"{key}.path")
    if config.embedder is not None and any(one.embeds for one in config.methods):
        with contextlib.suppress(ModelError):
            for folder, _, part in embedder_parts(config.embedder.path):
                yield EMBEDDER, str(folder), partial(dict, part)


def _check_names(
    path: str,
    key: str,
    stored: Mapping[str, Stored],
    *,
    causal: bool = False,
    classifier: bool = False,
    new_classifier: bool = False,
) -> None:
    """Raises ModelError where the files do not have the weights of such a model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from plumbline.models.loading import check_names

    if causal:
        check_names(AutoModelForCausalLM, path, key, stored)
    if classifier:
        check_names(AutoModelForSequenceClassification, path, key, stored)
    if new_classifier:
        check_names(AutoModelForSequenceClassification, path, key, stored, "new", num_labels=1)


def _check_vocabulary(tokenizer: "PreTrainedTokenizerBase", path: str, key: str) -> None:
    """Every token must have an embedding; of embeddings there may be more, as many models have for the shape's sake.

    Raises:
        ModelError: the tokenizer has a token that the model has not.
    """
    from plumbline.models.positions import read_config

    rows = getattr(read_config(path, key).get_text_config(), "vocab_size", None)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if rows is not None and largest >= rows:
        raise ModelError(
            f"{key}: {path}: its vocabulary has {rows} entries, and the tokenizer goes to id {largest} ({token!r}); "
            "take the tokenizer that it was trained with, or enlarge it (transformers' resize_token_embeddings)"
        )
