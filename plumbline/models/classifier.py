"""A reward model's logits of tokenised texts: the same in training and in scoring."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def classifier_logits(model: Any, texts: Sequence[Sequence[int]]) -> "Float[Tensor, 'n labels']":
    """A sequence classifier's logits of tokenised texts, fp32: in one row without padding where `packs_texts`.

    With PEFT layers and gradient checkpointing, in the model's dtype, mode and grad mode.
    """
    if packs_texts(model):
        from plumbline.models.packed import unwrapped

        return _packed_logits(unwrapped(model), texts)
    return _padded_logits(model, texts)


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


def _padded_logits(model: Any, texts: Sequence[Sequence[int]]) -> "Float[Tensor, 'n labels']":
    """Padded on the right whatever the tokenizer says: padding on the left shifts learnt positions, as BERT's are."""
    import torch

    width = max(map(len, texts))
    pad = _pad(model)
    ids = torch.tensor([[*t, *[pad] * (width - len(t))] for t in texts], device=model.device)
    mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts], device=model.device)
    return model(input_ids=ids, attention_mask=mask).logits.float()


def _pad(model: Any) -> int:
    return model.config.pad_token_id or 0
