"""`plumbline theory`: the theorem's quantities for a model directory and preference data, and how they are printed."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from plumbline.data.tokenizer import load_tokenizer
from plumbline.errors import UserError
from plumbline.methods.theory import MIN_PROMPTS, Theory, estimate, needed
from plumbline.models.loading import load_whole
from plumbline.models.positions import positions, read_config
from plumbline.runs.preferences import sample_groups


def measure(
    model_path: str,
    data: str,
    *,
    columns: Mapping[str, str] | None = None,
    prompts: int = 64,
    beta: float = 0.1,
    max_len: int = 512,
    seed: int = 0,
) -> Theory:
    """`estimate` for a model directory, in float32, and a sample that `sample_groups` draws from a preference file.

    Raises:
        UserError: an argument out of range, a model that cannot be loaded, or what the two functions raise.
    """
    if prompts < MIN_PROMPTS:
        raise UserError(f"{prompts} prompts are too few to estimate from; at least {MIN_PROMPTS} are needed")
    if not beta > 0:
        raise UserError(f"beta is {beta:g}; it should be above 0, such as 0.1")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    tokenizer = load_tokenizer(model_path)
    logging.disable_progress_bar()  # an error is to be the only line on stderr
    max_len = min(max_len, positions(read_config(model_path, "model")) or max_len)
    groups = sample_groups(
        data, tokenizer, columns=columns, prompts=prompts, least=MIN_PROMPTS, max_len=max_len, seed=seed
    )
    model = load_whole(AutoModelForCausalLM, model_path, "float32")
    nn.Module.to(model.eval(), "cuda" if torch.cuda.is_available() else "cpu")
    return estimate(model, groups, beta=beta)


def theory_text(theory: Theory, pairs: Sequence[float]) -> str:
    """What `plumbline theory` prints: the estimates, and the theorem's m for each number of balanced pairs."""
    lines = [
        f"{theory.prompts} prompts with {theory.negatives} negatives; gradients of all weights along their mean",
        f"σ1² {theory.positive_variance:.4g} (chosen) · σ2² {theory.negative_variance:.4g} (rejected) "
        f"· ρ {theory.correlation:+.3f} · λ {theory.lam:.3f} ± {theory.lam_error:.3f} "
        f"· λ(1−ρ²) {theory.lam_given_positive:.3f}",
        f"mean gradients of the two halves of the prompts: cosine {theory.agreement:.3f} (near 0: raise --prompts)",
        "",
        "| balanced pairs l | negatives m on one positive | m, if independent only given the positive |",
        "|---:|---:|---:|",
    ]
    for count in pairs:
        cells = (_count(needed(lam, count)) for lam in (theory.lam, theory.lam_given_positive))
        lines.append(f"| {count:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _count(m: float) -> str:
    if math.isnan(m):
        return "does not hold: λ > 1"
    return "no number is enough" if math.isinf(m) else f"{math.ceil(m - 1e-9)} ({m:.3f})"
