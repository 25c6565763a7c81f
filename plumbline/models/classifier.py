"""What a reward model reads of a conversation and an answer, and its logits: the same in training and in scoring."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float

from plumbline.records import Message

if TYPE_CHECKING:
    from torch import Tensor

Reads = Literal["response", "pair", "conversation"]


def reward_ids(
    tokenizer: Any, messages: Sequence[Message], response: str, *, reads: Reads, max_len: int
) -> tuple[list[int], bool]:
    """Token ids that a sequence classifier is given, and whether they were cut to `max_len`.

    An answer alone is cut at its end, a conversation at its beginning, so that the answer stays.
    """
    if reads == "conversation":
        turns = [{"role": m.role, "content": m.content} for m in messages]
        turns.append({"role": "assistant", "content": response})
        ids = tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
        return ids[-max_len:], len(ids) > max_len
    if reads == "pair":
        ids = tokenizer(messages[-1].content, response)["input_ids"]
    else:
        ids = tokenizer(response)["input_ids"]
    return ids[:max_len], len(ids) > max_len


def classifier_logits(model: Any, texts: Sequence[Sequence[int]]) -> "Float[Tensor, 'n labels']":
    """A sequence classifier's logits of tokenised texts, fp32.

    Padded on the right whatever the tokenizer says: padding on the left shifts learnt positions, as BERT's are.
    """
    import torch

    width = max(map(len, texts))
    pad = model.config.pad_token_id or 0
    ids = torch.tensor([[*t, *[pad] * (width - len(t))] for t in texts], device=model.device)
    mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts], device=model.device)
    return model(input_ids=ids, attention_mask=mask).logits.float()
