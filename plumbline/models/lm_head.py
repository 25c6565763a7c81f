"""Hidden states to log-probs of given tokens, through a model's LM head in chunks. Used by `group_logps`."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

HEAD_LOGITS = 2**26  # logits that exist at once: 256 MiB in fp32


def head_logps(model: PreTrainedModel, hidden: Float[Tensor, "N d"], targets: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Log-probs of `targets` after `hidden`, fp32, in nats; [N, vocab] never exists, in the backward pass neither.

    Args:
        model: a causal LM with output embeddings.
        hidden: last hidden states of the positions that predict the targets. N may be 0.
    """
    head = model.get_output_embeddings()
    assert head is not None  # `supports_shared_prefix` asked
    config = model.config.get_text_config()
    rows = max(1, HEAD_LOGITS // config.vocab_size)
    project = head.forward

    def score(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = _finish_logits(project(hidden).float(), config)
        return -F.cross_entropy(logits, targets, reduction="none")

    def forward(hidden: Tensor) -> Tensor:
        chunks = list(zip(hidden.split(rows), targets.split(rows), strict=True))
        if len(chunks) == 1:
            return score(hidden, targets)
        return torch.cat([checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])

    # All chunks go through one call of the module. ZeRO-3 gathers a module's weights in its call hooks, with all ranks
    # taking part: a call per chunk would gather them each time, and hang where ranks have different numbers of chunks.
    own = head.__dict__.get("forward")
    head.forward = forward
    try:
        return head(hidden)
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def _finish_logits(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """What some models do after their LM head, as their configs say it."""
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits
