"""Sentence embeddings: how near each answer is to its prompt's target, for Self-Contrast's filter (METHODS.md §2).

Pipelines pass a generator's answers on unread; the embedder reads them where they are. It sees responses only, never a
prompt. What has no cosine is nan: `plumbline.methods.selection` leaves it out, the pipeline's commit counts it (§4).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from actors.metrics import EMBEDDER_ITEMS, EMBEDDER_SECONDS
from plumbline.errors import ModelError
from plumbline.models.positions import positions
from plumbline.records import Generation
from plumbline.runs.models import check_body, embedder_parts

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedderSpec:
    """All that an embedder needs to start; picklable. `path` is the directory of a sentence-transformers model."""

    path: str
    device: Literal["cpu", "cuda"]
    batch_size: int = 32
    threads: int = 1


class Embedder:
    """One sentence-transformers model: pooling and maximum length are as its files say.

    A prompt that the model would put before every text by default is left out: what is embedded is the response alone.
    Raises ModelError where the directory holds no model that can be loaded.
    """

    def __init__(self, spec: EmbedderSpec) -> None:
        from plumbline.models.backend import set_up_torch

        set_up_torch(spec.threads)
        self._spec = spec
        self._model = _load(spec)
        self.embedded = 0
        self.truncated = 0

    def ready(self) -> int:
        """The process id, once the model is loaded."""
        return os.getpid()

    def counts(self) -> dict[str, int]:
        """Texts `embedded` since the start, and how many of them were longer than the model reads: `truncated`."""
        return {"embedded": self.embedded, "truncated": self.truncated}

    def similarities(self, targets: Sequence[str], generations: Sequence[Generation]) -> list[list[float]]:
        """Cosine of every completion's text with its prompt's target: one list a generation, whose target stands at
        the same place. nan where either text is blank, or its embedding is zero or not finite (METHODS.md §4).
        """
        texts = [[completion.text for completion in generation.completions] for generation in generations]
        units = self._units([*targets, *(text for row in texts for text in row)])
        return [
            [float(units[target] @ units[text]) if target in units and text in units else float("nan") for text in row]
            for target, row in zip(targets, texts, strict=True)
        ]

    def _units(self, texts: Sequence[str]) -> "dict[str, np.ndarray]":
        """Text -> its embedding at length 1, [d] fp64; without those that have none. Equal texts are embedded once."""
        import numpy as np

        asked = [text for text in dict.fromkeys(texts) if text.strip()]
        if not asked:
            return {}
        self.embedded += len(asked)
        self.truncated += self._too_long(asked)
        with EMBEDDER_SECONDS.timing():
            embeddings: Any = self._model.encode(
                asked, prompt="", batch_size=self._spec.batch_size, show_progress_bar=False, convert_to_numpy=True
            )
        EMBEDDER_ITEMS.inc(len(asked))
        vectors_ND = np.asarray(embeddings, dtype=np.float64)
        lengths_N = np.linalg.norm(vectors_ND, axis=1)
        return {
            text: vector / length
            for text, vector, length in zip(asked, vectors_ND, lengths_N, strict=True)
            if np.isfinite(length) and length > 0
        }

    def _too_long(self, texts: list[str]) -> int:
        """How many the model cuts off; 0 for a model whose tokenizer is not one of Hugging Face's."""
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerBase

        tokenizer = getattr(self._model[0], "tokenizer", None)
        if isinstance(tokenizer, Tokenizer):  # of a static embedding: no limit but the one in its own file
            return sum(bool(e.overflowing) for e in tokenizer.encode_batch(texts, add_special_tokens=False))
        limit = self._model.max_seq_length
        if limit is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
            return 0
        ids: Any = tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]
        return sum(len(one) > limit for one in ids)


def _load(spec: EmbedderSpec) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    for folder, kind, stored in embedder_parts(spec.path):
        if kind == "Transformer":
            check_body(str(folder), stored)  # what its files lack would be random
    try:
        model = SentenceTransformer(
            spec.path,
            device=spec.device,
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:  # its modules raise a dozen kinds, from OSError to those of Rust parts
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"embedder.path: {spec.path}: cannot be loaded ({what})") from error
    limit = positions(model[0].config) if isinstance(model[0], Transformer) else None
    if limit is not None and model.max_seq_length is not None:
        model.max_seq_length = min(model.max_seq_length, limit)
    return model.float().eval()
