"""How many tokens a model can read, by its config: what lengths of a run are held against."""

from typing import Any

from plumbline.errors import ModelError, in_one_line

_KEYS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length"),
    *("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len"),
)
"""What configs call it, as vLLM looks for it."""
_SCALED_ALREADY = ("default", "su", "longrope", "llama3")
"""Ropes whose config has the scaled length; others multiply theirs by `factor`."""


def read_config(path: str, key: str) -> Any:
    """A model's config, without remote code. Raises ModelError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever it says by it, it says of this file
        raise ModelError(f"{key}: {path}: its config.json cannot be read ({in_one_line(error)})") from None


def positions(config: Any) -> int | None:
    """The most tokens that a model of `config` can be given; None where it has no limit.

    The same as vLLM derives: it refuses to go beyond, and so do we. A table of learnt positions may have some that no
    token gets (`_unused`).
    """
    text = config.get_text_config()
    limits = [limit for key in _KEYS if isinstance(limit := getattr(text, key, None), int) and limit > 0]
    if not limits or getattr(text, "position_biased_input", True) is False:  # DeBERTa has relative positions alone
        return None
    limit = getattr(text, "model_max_length", None) or min(limits)
    ropes = getattr(text, "rope_parameters", None)
    if not ropes:
        return int(limit) - _unused(text)
    if "gemma3" in str(text.model_type):
        return int(limit)
    factor = 1.0
    for rope in ropes.values() if isinstance(next(iter(ropes.values())), dict) else [ropes]:
        kind = rope.get("rope_type", "default")
        if kind not in _SCALED_ALREADY:
            factor = rope.get("factor") or factor
        if kind == "yarn":
            limit = rope.get("original_max_position_embeddings") or limit
    return int(limit * factor)


def _unused(config: Any) -> int:
    """Learnt positions that stand before the first token's: RoBERTa and its kin count from their padding's on."""
    import torch
    from torch import nn
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except Exception:  # no model of transformers: who loads it will say so
        return 0
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    padded = [m.padding_idx for m in tables if isinstance(m, nn.Embedding) and m.padding_idx is not None]
    return padded[0] + 1 if padded else 0
