"""The world's sentence embedder: a static one, whose cosine is nearly the overlap of words, rare ones counting most.

Small enough to be made in a second, and loaded by the very class that loads a real one (sentence-transformers).
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WIDTH = 256


def make_embedder(directory: Path, tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], seed: int) -> None:
    """Save an embedder: each token's vector has a random direction and the length of its inverse document frequency.

    Args:
        texts: what frequencies are counted in.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    counts = Counter(token for text in texts for token in set(tokenizer.encode(text, add_special_tokens=False)))
    frequencies = [math.log((1 + len(texts)) / (1 + counts[token])) for token in range(len(tokenizer))]
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(len(tokenizer), WIDTH, generator=draw) / math.sqrt(WIDTH)
    weights = directions * torch.tensor(frequencies)[:, None]
    module = StaticEmbedding(tokenizer.backend_tokenizer, embedding_weights=weights.numpy())
    SentenceTransformer(modules=[module], device="cpu").save(str(directory), create_model_card=False)
