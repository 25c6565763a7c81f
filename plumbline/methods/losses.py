"""The losses of every method, pure functions of log-probs: tensors and floats in, (scalar loss, metrics) out, in fp32.

Called by the learner's train loop. A loss is a mean over the prompts of the batch (G), and so is every metric: a batch
may be cut into shards whose losses, gradients and metrics are weighted by g/G, and nothing changes. Reference
log-probs, margins, rewards and token counts are constants here: no gradient flows into them. METHODS.md §0–§3.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Metrics = dict[str, Tensor]


def dpo_loss(
    chosen_logps: Float[Tensor, "G"],
    rejected_logps: Float[Tensor, "G M"],
    ref_chosen_logps: Float[Tensor, "G"],
    ref_rejected_logps: Float[Tensor, "G M"],
    *,
    beta: float,
    margins: Float[Tensor, "G M"] | None = None,
    margin_weight: float = 0.2,
    margin_clamp: tuple[float, float] = (-40.0, 40.0),
    rejected_mask: Bool[Tensor, "G M"] | None = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """DPO with M negatives a prompt, and DLMA's margin inside β: softplus(−β(h − w·clamp(R))). METHODS.md §0–§2.

    A prompt's loss is the mean over its own negatives, the batch's the mean over prompts. All log-probs are sums over
    response tokens, in nats.

    Args:
        beta: DPO's β, outside of the margin too: a paper's weight outside β equals ``beta * margin_weight``.
        margins: self-reward margins R; None is plain DPO, and so is ``margin_weight=0``.
        margin_clamp: lowest and highest R that counts, before the weight.
        rejected_mask: which negatives exist; the others may hold anything, NaN included. None: all of them.

    Returns:
        The loss, and means over prompts: `accuracy` (share of h > 0), `margin` (h), `chosen_reward` and
        `rejected_reward` (β times policy minus reference), and with margins `clamp_saturation` (share of R at a bound).

    Raises:
        ValueError: a prompt has no negative. Such a prompt is dropped and counted before it gets here (METHODS.md §2).
    """
    if rejected_mask is None:
        rejected_mask = torch.ones_like(rejected_logps, dtype=torch.bool)
    _refuse(~rejected_mask.any(dim=1), "dpo_loss", "have no negative")

    # Masked entries are replaced before any arithmetic: a NaN that is masked afterwards still has a NaN gradient.
    rejected_GM = (rejected_logps.float() - ref_rejected_logps.detach().float()).masked_fill(~rejected_mask, 0.0)
    chosen_G = chosen_logps.float() - ref_chosen_logps.detach().float()
    h_GM = chosen_G[:, None] - rejected_GM
    low, high = margin_clamp
    margins_GM = torch.zeros_like(h_GM) if margins is None else margins.detach().masked_fill(~rejected_mask, 0.0)
    weight = 0.0 if margins is None else margin_weight
    losses_GM = F.softplus(-beta * (h_GM - weight * margins_GM.clamp(low, high).float()))

    def mean(values_GM: Tensor) -> Tensor:
        return ((values_GM.float() * rejected_mask).sum(dim=1) / rejected_mask.sum(dim=1)).mean()

    metrics = {
        "accuracy": mean(h_GM.gt(0)),
        "margin": mean(h_GM),
        "chosen_reward": beta * chosen_G.mean(),
        "rejected_reward": beta * mean(rejected_GM),
    }
    if margins is not None:
        metrics["clamp_saturation"] = mean(margins_GM.le(low) | margins_GM.ge(high))
    return mean(losses_GM), _detached(metrics)


def ple_loss(
    plain_logps: Float[Tensor, "G"],
    guided_logps: Float[Tensor, "G"],
    plain_tokens: Int[Tensor, "G"],
    guided_tokens: Int[Tensor, "G"],
    plain_rewards: Float[Tensor, "G"],
    guided_rewards: Float[Tensor, "G"],
    *,
    threshold: float,
    length_normalize_sft: bool = False,
    hinge: float | None = None,
    rank_weight: float = 1.0,
    sft_weight: float = 1.0,
) -> tuple[Float[Tensor, ""], Metrics]:
    """PLE: a rank loss where the guided answer's reward leads by more than τ, else weighted SFT. METHODS.md §3.

    With d = s′ − s: d > τ gives −(S(y′)/N(y′) − S(y)/N(y)), a per-token mean; d ≤ τ gives −(w·S(y) − w·S(y′)) with
    w = tanh(−d/2), a token sum. y is the plain answer, y′ the guided one, both under the plain prompt.

    Args:
        plain_logps, guided_logps: S, sums over response tokens, in nats.
        plain_tokens, guided_tokens: N.
        threshold: the current τ; samples are classified by it afresh at each call.
        length_normalize_sft: divide each S of the weighted SFT by its N (the paper's sum outweighs the rank loss).
        hinge: stop pulling once y′ leads by this many nats a token, so that L_rank ≥ −hinge. None is the paper.
        rank_weight, sft_weight: 0 drops a term, for the paper's ablations.

    Returns:
        The loss, and means over prompts: `rank_loss` and `sft_loss` (before the weights; each counts 0 where the other
        applies), `rank_share`, `plain_logp_per_token`, `guided_logp_per_token`, `gap` (d).

    Raises:
        ValueError: an answer has no tokens. Blank answers are dropped and counted before scoring (METHODS.md §4).
    """
    _refuse((plain_tokens <= 0) | (guided_tokens <= 0), "ple_loss", "have a blank answer")
    plain_G, guided_G = plain_logps.float(), guided_logps.float()
    plain_mean_G, guided_mean_G = plain_G / plain_tokens, guided_G / guided_tokens

    gap_G = (guided_rewards - plain_rewards).detach()
    ranked_G = gap_G > threshold  # strictly: d == τ is weighted SFT
    rank_G = plain_mean_G - guided_mean_G
    if hinge is not None:
        rank_G = rank_G.clamp(min=-hinge)
    weight_G = torch.tanh(-gap_G / 2).float()
    sft_G = -weight_G * (plain_mean_G - guided_mean_G if length_normalize_sft else plain_G - guided_G)

    rank_loss = torch.where(ranked_G, rank_G, 0.0).mean()
    sft_loss_ = torch.where(ranked_G, 0.0, sft_G).mean()
    metrics = {
        "rank_loss": rank_loss,
        "sft_loss": sft_loss_,
        "rank_share": ranked_G.float().mean(),
        "plain_logp_per_token": plain_mean_G.mean(),
        "guided_logp_per_token": guided_mean_G.mean(),
        "gap": gap_G.float().mean(),
    }
    return rank_weight * rank_loss + sft_weight * sft_loss_, _detached(metrics)


def sft_loss(logps: Float[Tensor, "G"], tokens: Int[Tensor, "G"]) -> tuple[Float[Tensor, ""], Metrics]:
    """Supervised fine-tuning: each prompt's NLL divided by its own tokens, then the mean over prompts. METHODS.md §0.

    Not the mean over all tokens of the batch: that would weigh a prompt by who else is in its shard, so that a batch
    cut differently would give another gradient.

    Args:
        logps: sums over response tokens, in nats.
        tokens: response tokens.

    Returns:
        The loss in nats a token, and means over prompts: `nll_per_token`, `tokens`.

    Raises:
        ValueError: a response has no tokens.
    """
    _refuse(tokens <= 0, "sft_loss", "have a blank response")
    loss = -(logps.float() / tokens).mean()
    return loss, _detached({"nll_per_token": loss, "tokens": tokens.float().mean()})


def reward_model_loss(
    chosen_scores: Float[Tensor, "G"], rejected_scores: Float[Tensor, "G"]
) -> tuple[Float[Tensor, ""], Metrics]:
    """Bradley–Terry on pairs: mean softplus(−(r_chosen − r_rejected)). METHODS.md §7.

    Returns:
        The loss, and means over pairs: `accuracy` (share of chosen > rejected), `margin`, `chosen_score`,
        `rejected_score`.
    """
    chosen_G, rejected_G = chosen_scores.float(), rejected_scores.float()
    margin_G = chosen_G - rejected_G
    metrics = {
        "accuracy": (margin_G > 0).float().mean(),
        "margin": margin_G.mean(),
        "chosen_score": chosen_G.mean(),
        "rejected_score": rejected_G.mean(),
    }
    return F.softplus(-margin_G).mean(), _detached(metrics)


def _detached(metrics: Metrics) -> Metrics:
    return {name: value.detach() for name, value in metrics.items()}


def _refuse(wrong_G: Bool[Tensor, "G"], loss: str, why: str) -> None:
    if wrong_G.any():
        rows = wrong_G.nonzero().flatten().tolist()
        raise ValueError(f"{loss}: prompts {rows} of the batch {why}; drop and count them before the loss")
