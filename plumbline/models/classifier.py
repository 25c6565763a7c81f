"""A reward model's logits of tokenised texts: the same in training and in scoring."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Beside = Sequence[Mapping[str, Sequence[int]]]
"""What a tokenizer returned of each text beside its token ids, by name, a number a token; empty for nothing."""


def classifier_logits(model: Any, texts: Sequence[Sequence[int]], beside: Beside = ()) -> "Float[Tensor, 'n labels']":
    """A sequence classifier's logits of tokenised texts, fp32: in one row without padding where `packs_texts`.

    With PEFT layers and gradient checkpointing, in the model's dtype, mode and grad mode.

    Args:
        beside: of each text; the model is given what its forward takes of it.
    """
    inner = getattr(model, "get_base_model", lambda: model)()  # out of PEFT's wrapper
    taken = inspect.signature(inner.forward).parameters
    names = [name for name in (beside[0] if beside else ()) if name in taken]
    if packs_texts(model) and not names:
        return _packed_logits(inner, texts)
    return _padded_logits(model, texts, {name: [one[name] for one in beside] for name in names})


def packs_texts(model: "nn.Module") -> bool:
    """Whether `classifier_logits` computes texts in one row: what it costs is then their tokens, padding is none.

    So it is for a causal body under a head named `score` that reads each text's last position, if a tiny batch
    computed both ways agrees; found once per model, and remembered. Encoders, which look both ways, are padded.
    """
    from plumbline.models import packed

    if getattr(model, "score", None) is None:
        return False
    return packed.supports(model, _compare, "texts are padded, which is slower")


def _compare(model: "PreTrainedModel") -> str:
    """How the packed logits of a tiny batch differ from the padded ones; see `packed.supports`."""
    from plumbline.models import packed

    vocabulary = model.config.get_text_config().vocab_size
    texts = [[(7 * i + 11 * n + 3) % vocabulary for i in range(n)] for n in (5, 1, 9, 3)]
    padded = _padded_logits(model, texts)
    scale = 3 * padded.abs().max()  # not their sizes: in bfloat16 a logit near 0 is what large terms leave
    return packed.difference(_packed_logits(model, texts), padded, model, scale, "logits")


def _packed_logits(model: "PreTrainedModel", texts: Sequence[Sequence[int]]) -> "Float[Tensor, 'n labels']":
    """All texts in one row; the head reads one position of each: its last that is not the token that pads.

    That is where transformers' heads read, also of a text that itself ends in the token that pads.
    """
    from plumbline.models.packed import hidden_states
    from plumbline.models.shared_prefix import Layout

    ids: list[int] = []
    positions: list[int] = []
    read: list[int] = []
    pad = _pad(model)
    for text in texts:
        read.append(len(ids) + max((i for i, token in enumerate(text) if token != pad), default=0))
        ids += text
        positions += range(len(text))
    hidden = hidden_states(model, ids, positions, Layout([(len(text), ()) for text in texts]))
    return model.score(hidden[read]).float()  # type: ignore[operator]  # a module: `packs_texts` asked


def _padded_logits(
    model: Any, texts: Sequence[Sequence[int]], beside: Mapping[str, Sequence[Sequence[int]]] | None = None
) -> "Float[Tensor, 'n labels']":
    """Padded on the right whatever the tokenizer says: padding on the left shifts learnt positions, as BERT's are."""
    import torch

    width = max(map(len, texts))

    def padded(rows: Sequence[Sequence[int]], filler: int) -> "Tensor":
        return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=model.device)

    mask = padded([[1] * len(text) for text in texts], 0)
    further = {name: padded(rows, 0) for name, rows in (beside or {}).items()}
    return model(input_ids=padded(texts, _pad(model)), attention_mask=mask, **further).logits.float()


def _pad(model: Any) -> int:
    return model.config.pad_token_id or 0
