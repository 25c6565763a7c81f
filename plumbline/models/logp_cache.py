"""Log-probs that a frozen model has computed before: sums over responses, in SQLite, keyed by what they depend on.

`actors.reference` asks it before every forward pass, so that a resumed run, or a second one over the same pairs,
computes nothing twice.
"""

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path

from plumbline.errors import ModelError
from plumbline.models.value_cache import ValueCache
from plumbline.records import TokenGroup

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


class LogpCache(ValueCache):
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
        super().__init__(path, "logps", "log-probs", "fleet.reference.cache")
        self.hits = 0
        self.misses = 0
        self._model = hashlib.sha256(model.encode()).digest()

    def get(self, groups: Sequence[TokenGroup]) -> list[list[float | None]]:
        """One value a response, None where it is not known; counts `hits` and `misses`."""
        keys = [self._keys(group) for group in groups]
        found = self.find([key for row in keys for key in row])
        values = [[found.get(key) for key in row] for row in keys]
        known = sum(value is not None for row in values for value in row)
        self.hits += known
        self.misses += sum(map(len, values)) - known
        return values

    def put(self, groups: Sequence[TokenGroup], values: Sequence[Sequence[float]]) -> None:
        """Keep one value a response; see `keep`."""
        self.keep(
            pair for group, row in zip(groups, values, strict=True) for pair in zip(self._keys(group), row, strict=True)
        )

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
