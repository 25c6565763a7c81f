"""What a reward model reads of a conversation and an answer, and its logits: the same in training and in scoring."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float

from plumbline.records import Message

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Reads = Literal["response", "pair", "conversation"]


Beside = Sequence[Mapping[str, Sequence[int]]]
"""What a tokenizer returned of each text beside its token ids, by name, a number a token; empty for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardText:
    """What a sequence classifier is given: token ids, what its tokenizer returned beside them, by name, a number a
    token (`token_type_ids`, which tell a pair's query from its answer), and whether both were `cut`."""

    ids: list[int]
    beside: dict[str, list[int]]
    cut: bool


def reward_text(
    tokenizer: Any, messages: Sequence[Message], response: str, *, reads: Reads, max_len: int
) -> RewardText:
    """Tokenise what a reward `reads`, cut to `max_len` tokens.

    An answer alone is cut at its end, a conversation at its beginning, so that the answer stays.
    """
    kept = slice(max_len)
    if reads == "conversation":
        found = dict(tokenizer.apply_chat_template(_turns(messages, response), tokenize=True))
        kept = slice(-max_len, None)
    else:
        texts = (messages[-1].content, response) if reads == "pair" else (response,)
        found = dict(tokenizer(*texts))
    ids = found.pop("input_ids")
    found.pop("attention_mask", None)  # there is no padding yet
    return RewardText(
        ids=ids[kept],
        beside={name: values[kept] for name, values in found.items() if len(values) == len(ids)},
        cut=len(ids) > max_len,
    )


def conversation_text(tokenizer: Any, messages: Sequence[Message], response: str) -> str:
    """What is tokenised of a conversation. Raises whatever the chat template does that refuses it."""
    return tokenizer.apply_chat_template(_turns(messages, response), tokenize=False)


def _turns(messages: Sequence[Message], response: str) -> list[dict[str, str]]:
    turns = [{"role": m.role, "content": m.content} for m in messages]
    return [*turns, {"role": "assistant", "content": response}]


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
