"""FLOPs that training asks for, and the most that a card gives: what MFU is made of.

Called by learners (`actors/learning/pace.py`) and `benchmarks/learner.py`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from plumbline.models.packed import unwrapped
from plumbline.records import TokenGroup

# FLOP/s of dense matmuls in bfloat16, without sparsity, as NVIDIA's data sheets have them (of the RTX 4090: the Ada
# whitepaper, with float32 sums). All words of a line must be in the device's name; the first line that fits counts.
PEAKS: Sequence[tuple[frozenset[str], float]] = (
    (frozenset({"H100", "PCIe"}), 756e12),
    (frozenset({"H100", "NVL"}), 835e12),
    (frozenset({"H100"}), 989e12),
    (frozenset({"H200", "NVL"}), 835e12),
    (frozenset({"H200"}), 989e12),
    (frozenset({"A100"}), 312e12),
    (frozenset({"L40S"}), 362e12),
    (frozenset({"RTX", "4090"}), 165e12),
)


def card_peak(name: str) -> float | None:
    """FLOP/s of the card that torch calls `name`; None for one that is not in the table, and for a slice of one."""
    words = set(re.split(r"[\s-]+", name))
    return next((peak for wanted, peak in PEAKS if wanted <= words and "MIG" not in words), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCost:
    """FLOPs of one forward and backward, by what they grow with. Only matmuls and attention count, and nothing that is
    computed twice: neither gradient checkpointing nor what a kernel repeats.

    A weight of a matmul costs 6 FLOPs a token where it is trained: 2 in the forward pass, 2 for the gradient of what
    comes in, 2 for its own. A frozen one, as under an adapter, costs 4. Attention costs 12 · heads · head size a layer
    for each query and key that see each other: 4 in the forward pass, 8 in the backward pass.

    Attributes:
        token: of a token that is computed, in the matmuls of the body, adapters included.
        scored: of a position that the LM head reads; 0 where there is none, a classifier's head being next to nothing.
        pairs: of a query with a key, over all layers that have the same sliding window (None: without one).
    """

    token: int
    scored: int
    pairs: tuple[tuple[int | None, int], ...]

    def of(self, groups: Sequence[TokenGroup]) -> int:
        """FLOPs of training on `groups` once, each prompt computed once and no padding."""
        total = 0
        for group in groups:
            prompt, lengths = len(group.prompt_ids), [len(response) for response in group.response_ids]
            total += self.token * group.tokens + self.scored * sum(lengths)
            for window, flops in self.pairs:
                before = seen_keys(prompt, window)
                total += flops * (before + sum(seen_keys(prompt + length, window) - before for length in lengths))
        return total


def seen_keys(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, in a causal sequence: token i sees i keys, at most `window`."""
    short = length if window is None else min(length, window)
    return short * (short + 1) // 2 + (length - short) * short


def training_cost(model: nn.Module) -> TrainingCost | None:
    """What training `model` costs, by its linear layers and which of them are trained; before its weights are cut.

    None where this count would be wrong: experts, of which a token meets a few; mixers other than attention; encoders.

    Args:
        model: a transformers causal LM or a classifier on a causal body, PEFT-wrapped or not.
    """
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    head = inner.get_output_embeddings()
    if head is None and getattr(inner, "score", None) is None:
        return None
    heads = getattr(config, "num_attention_heads", None)
    kinds = getattr(config, "layer_types", None)
    if heads is None or not set(kinds or ()) <= {"full_attention", "sliding_attention"}:
        return None
    modules = dict(model.named_modules())
    if any("experts" in name.split(".") for name in modules):
        return None
    body = [module for module in modules.values() if module is not head]
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    local = getattr(config, "sliding_window", None)
    windows = [local if kind == "sliding_attention" else None for kind in kinds or ()]
    windows = windows or [local] * config.num_hidden_layers
    return TrainingCost(
        token=sum(map(_matmul, body)),
        scored=0 if head is None else _matmul(head),
        pairs=tuple((window, 12 * heads * size * windows.count(window)) for window in dict.fromkeys(windows)),
    )


def _matmul(module: nn.Module) -> int:
    """FLOPs that a module's own weight costs a token, 0 where it is none of a matmul."""
    if isinstance(module, nn.Linear):
        size, weight = module.in_features * module.out_features, module.weight
    elif type(module).__name__ == "Conv1D":  # GPT-2's
        size, weight = module.nx * module.nf, module.weight  # type: ignore[operator]
    else:
        return 0
    return (6 if weight.requires_grad else 4) * size  # type: ignore[union-attr,operator,return-value]
