"""Losses against values worked by hand, the identities of METHODS.md, gradient signs and invariance to sharding."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from plumbline.methods.losses import Metrics, dpo_loss, ple_loss, reward_model_loss, sft_loss


def row(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, requires_grad=grad)


# DLMA and DPO


@pytest.mark.parametrize(
    ("margin", "loss", "gradient"),
    [
        (-40.0, 0.37110, -0.03100),
        (-1000.0, 0.37110, -0.03100),
        (0.0, 0.69315, -0.05),
        (40.0, 1.17110, -0.06900),
        (1000.0, 1.17110, -0.06900),
    ],
)
def test_dlma_values_at_h_zero(margin: float, loss: float, gradient: float) -> None:
    chosen = row(-5.0, grad=True)
    got, _ = dpo_loss(chosen, row(-7.0)[None], row(-5.0), row(-7.0)[None], beta=0.1, margins=row(margin)[None])
    got.backward()
    assert got.item() == pytest.approx(loss, abs=5e-6)
    assert chosen.grad is not None and chosen.grad.item() == pytest.approx(gradient, abs=5e-6)  # dh/dchosen is 1


@pytest.mark.parametrize("margin", [-1000.0, -3.0, 0.0, 3.0, 1000.0])
@pytest.mark.parametrize("h", [-60.0, 0.0, 60.0])
def test_a_margin_never_flips_a_pair(margin: float, h: float) -> None:
    chosen, rejected = row(h, grad=True), row(0.0, grad=True)
    loss, _ = dpo_loss(chosen, rejected[None], row(0.0), row(0.0)[None], beta=0.1, margins=row(margin)[None])
    loss.backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() < 0 < rejected.grad.item()


def test_plain_dpo_by_hand() -> None:
    # h = (−1 + 2) − (−3 + 2) = 2, softplus(−.5·2) = .313262; rewards .5·(±1)
    loss, metrics = dpo_loss(row(-1.0), row(-3.0)[None], row(-2.0), row(-2.0)[None], beta=0.5)
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"accuracy": 1.0, "margin": 2.0, "chosen_reward": 0.5, "rejected_reward": -0.5}
    )


def test_a_prompts_loss_is_the_mean_over_its_negatives() -> None:
    # h = 2 and h = 0: (.313262 + .693147) / 2
    loss, metrics = dpo_loss(row(-1.0), row(-3.0, -1.0)[None], row(-2.0), row(-2.0, -2.0)[None], beta=0.5)
    assert loss.item() == pytest.approx(0.503205, abs=1e-6)
    assert metrics["accuracy"].item() == 0.5 and metrics["margin"].item() == 1.0


def test_the_batch_is_the_mean_over_prompts_not_pairs() -> None:
    # prompt 0 has one negative (h = 2), prompt 1 two (h = 0): over pairs it would be .566519
    loss, _ = dpo_loss(
        row(-1.0, -1.0),
        torch.tensor([[-3.0, 0.0], [-1.0, -1.0]]),
        row(-2.0, -2.0),
        torch.full((2, 2), -2.0),
        beta=0.5,
        rejected_mask=torch.tensor([[True, False], [True, True]]),
    )
    assert loss.item() == pytest.approx(0.503205, abs=1e-6)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_negatives_leave_no_trace(garbage: float) -> None:
    chosen = row(-1.0, grad=True)
    rejected = torch.tensor([[-3.0, garbage]], requires_grad=True)
    loss, metrics = dpo_loss(
        chosen,
        rejected,
        row(-2.0),
        torch.tensor([[-2.0, garbage]]),
        beta=0.5,
        margins=torch.tensor([[-40.0, garbage]]),
        margin_weight=0.1,
        rejected_mask=torch.tensor([[True, False]]),
    )
    loss.backward()
    # softplus(−.5·(2 + 4)) = .048587, and −.5·σ(−3) = −.023713
    assert loss.item() == pytest.approx(0.048587, abs=1e-6)
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.023713, abs=1e-6)
    assert rejected.grad[0, 0].item() == pytest.approx(0.023713, abs=1e-6) and rejected.grad[0, 1].item() == 0.0
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["clamp_saturation"].item() == 1.0


def test_a_prompt_without_negatives_is_refused() -> None:
    mask = torch.tensor([[True], [False], [True]])
    zeros = torch.zeros(3)
    with pytest.raises(ValueError, match=r"prompts \[1\] of the batch have no negative"):
        dpo_loss(zeros, zeros[:, None], zeros, zeros[:, None], beta=0.1, rejected_mask=mask)


def test_weight_zero_and_no_margins_are_plain_dpo() -> None:
    arguments = _dpo_batch(6, 3)
    plain, _ = dpo_loss(*arguments, beta=0.1)
    margins = torch.linspace(-90, 90, 18).view(6, 3)
    assert torch.equal(dpo_loss(*arguments, beta=0.1, margins=margins, margin_weight=0.0)[0], plain)
    assert torch.equal(dpo_loss(*arguments, beta=0.1, margins=torch.zeros(6, 3))[0], plain)
    assert not torch.equal(dpo_loss(*arguments, beta=0.1, margins=margins)[0], plain)


def test_one_negative_equals_the_textbook_form() -> None:
    chosen, rejected, ref_chosen, ref_rejected = _dpo_batch(6, 1)
    loss, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    h = (chosen - ref_chosen) - (rejected - ref_rejected)[:, 0]
    assert loss.item() == pytest.approx(-torch.nn.functional.logsigmoid(0.3 * h).mean().item(), rel=1e-6)


def test_clamp_saturation_counts_both_bounds() -> None:
    zeros = torch.zeros(1, 4)
    margins = torch.tensor([[-41.0, 39.0, 40.0, 0.0]])
    assert dpo_loss(row(0.0), zeros, row(0.0), zeros, beta=0.1, margins=margins)[1]["clamp_saturation"].item() == 0.5


def test_constants_get_no_gradient() -> None:
    chosen, rejected, ref_chosen, ref_rejected = (tensor.requires_grad_() for tensor in _dpo_batch(2, 2))
    margins = torch.ones(2, 2, requires_grad=True)
    dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, margins=margins)[0].backward()
    assert ref_chosen.grad is None and ref_rejected.grad is None and margins.grad is None
    assert chosen.grad is not None and rejected.grad is not None


# PLE. S(y) = −4 over 2 tokens, S(y′) = −9 over 3: per token −2 and −3.


def ple(
    gap: float, threshold: float, *, length_normalize_sft: bool = False, hinge: float | None = None
) -> tuple[float, list[float], Metrics]:
    """Loss, its gradient by S(y) and S(y′), and metrics, for a gap of rewards."""
    plain, guided = row(-4.0, grad=True), row(-9.0, grad=True)
    loss, metrics = ple_loss(
        plain,
        guided,
        torch.tensor([2]),
        torch.tensor([3]),
        row(0.0),
        row(gap),
        threshold=threshold,
        length_normalize_sft=length_normalize_sft,
        hinge=hinge,
    )
    loss.backward()
    assert plain.grad is not None and guided.grad is not None
    return loss.item(), [plain.grad.item(), guided.grad.item()], metrics


def test_rank_branch_is_a_per_token_mean() -> None:
    loss, gradient, metrics = ple(0.5, 0.2)
    assert loss == pytest.approx(1.0)  # −(−3 − −2)
    assert gradient == pytest.approx([1 / 2, -1 / 3])
    assert metrics["rank_share"].item() == 1 and metrics["rank_loss"].item() == pytest.approx(1.0)
    assert metrics["sft_loss"].item() == 0 and metrics["gap"].item() == 0.5
    assert metrics["plain_logp_per_token"].item() == -2 and metrics["guided_logp_per_token"].item() == -3


@pytest.mark.parametrize(
    ("gap", "w", "loss"),
    [
        (0.2, -0.099668, 0.498340),  # −w·(S(y) − S(y′)) = −w·5
        (1.0, -0.462117, 2.310586),
        (2.0, -0.761594, 3.807971),
        (-2.0, 0.761594, -3.807971),
        (-0.2, 0.099668, -0.498340),
        (0.0, 0.0, 0.0),
    ],
)
def test_weighted_sft_is_a_token_sum(gap: float, w: float, loss: float) -> None:
    got, gradient, metrics = ple(gap, 2.0)
    assert got == pytest.approx(loss, abs=2e-6)
    assert gradient == pytest.approx([-w, w], abs=1e-6)
    assert metrics["rank_share"].item() == 0 and metrics["rank_loss"].item() == 0


def test_huge_gaps_do_not_overflow() -> None:
    loss, gradient, _ = ple(-1e4, 0.2)  # e^s would be infinite; tanh is 1
    assert loss == pytest.approx(-5.0) and gradient == pytest.approx([-1.0, 1.0])


def test_length_normalised_sft() -> None:
    loss, gradient, _ = ple(0.2, 0.2, length_normalize_sft=True)
    assert loss == pytest.approx(0.099668, abs=1e-6)  # −w·(−2 − −3)
    assert gradient == pytest.approx([0.049834, -0.033223], abs=1e-6)


def test_the_threshold_is_strict_and_reclassifies_stored_scores() -> None:
    assert ple(0.2, 0.2)[2]["rank_share"].item() == 0
    assert ple(0.2, 0.18)[2]["rank_share"].item() == 1
    assert ple(0.25, 0.25)[2]["rank_share"].item() == 0
    assert ple(-0.5, 0.2)[2]["rank_share"].item() == 0


def test_hinge_bounds_the_rank_loss() -> None:
    def lead(hinge: float | None) -> tuple[float, float]:
        guided = row(-3.0, grad=True)  # −1 a token, y at −2: y′ leads by 1
        tokens = torch.tensor([2]), torch.tensor([3])
        loss, _ = ple_loss(row(-4.0), guided, *tokens, row(0.0), row(1.0), threshold=0.2, hinge=hinge)
        loss.backward()
        assert guided.grad is not None
        return loss.item(), guided.grad.item()

    assert lead(None) == pytest.approx((-1.0, -1 / 3))
    assert lead(2.0) == pytest.approx((-1.0, -1 / 3))
    assert lead(0.5) == pytest.approx((-0.5, 0.0))


def test_ablation_weights_drop_a_term() -> None:
    arguments = row(-4.0, -4.0), row(-9.0, -9.0), torch.tensor([2, 2]), torch.tensor([3, 3])
    rewards = row(0.0, 0.0), row(0.5, 0.2)  # one prompt ranks (1.0), the other is weighted SFT (.498340)

    def loss(rank_weight: float = 1.0, sft_weight: float = 1.0) -> float:
        return ple_loss(*arguments, *rewards, threshold=0.2, rank_weight=rank_weight, sft_weight=sft_weight)[0].item()

    assert loss() == pytest.approx(0.749170, abs=1e-6)
    assert loss(rank_weight=0.0) == pytest.approx(0.249170, abs=1e-6)
    assert loss(sft_weight=0.0) == pytest.approx(0.5, abs=1e-6)


def test_per_token_gradients_through_a_softmax() -> None:
    # A uniform policy over 4 tokens: d(log p(t))/d(logits) is .75 at t and −.25 elsewhere.
    def gradient(gap: float) -> tuple[list[float], list[float]]:
        plain, guided = torch.zeros(2, 4, requires_grad=True), torch.zeros(5, 4, requires_grad=True)
        sums = [logits.log_softmax(dim=-1)[:, 1].sum()[None] for logits in (plain, guided)]
        tokens = torch.tensor([2]), torch.tensor([5])
        ple_loss(sums[0], sums[1], *tokens, row(0.0), row(gap), threshold=0.2)[0].backward()
        assert plain.grad is not None and guided.grad is not None
        assert torch.equal(plain.grad[0], plain.grad[1]) and torch.equal(guided.grad[0], guided.grad[4])
        return plain.grad[0].tolist(), guided.grad[0].tolist()

    plain, guided = gradient(1.0)  # rank: +1/2 a token of y, −1/5 a token of y′
    assert plain == pytest.approx([-0.125, 0.375, -0.125, -0.125])
    assert guided == pytest.approx([0.05, -0.15, 0.05, 0.05])
    plain, guided = gradient(-1.0)  # weighted SFT: w = .462117, −w a token of y, +w a token of y′
    assert plain == pytest.approx([0.115529, -0.346588, 0.115529, 0.115529], abs=1e-6)
    assert guided == pytest.approx([-0.115529, 0.346588, -0.115529, -0.115529], abs=1e-6)


def test_blank_answers_are_refused() -> None:
    tokens = torch.tensor([2, 0]), torch.tensor([3, 3])
    with pytest.raises(ValueError, match=r"prompts \[1\] of the batch have a blank answer"):
        ple_loss(row(-4.0, 0.0), row(-9.0, -9.0), *tokens, row(0.0, 0.0), row(0.1, 0.1), threshold=0.2)
    with pytest.raises(ValueError, match=r"prompts \[0\]"):
        sft_loss(row(0.0, -1.0), torch.tensor([0, 1]))


# SFT, reward model, sharding


def test_sft_by_hand() -> None:
    loss, metrics = sft_loss(row(-2.0, -9.0), torch.tensor([2, 3]))
    assert loss.item() == pytest.approx(2.0)  # (1 + 3) / 2; over all tokens it would be 2.2
    assert metrics["nll_per_token"].item() == pytest.approx(2.0) and metrics["tokens"].item() == 2.5


def test_reward_model_by_hand() -> None:
    chosen = row(3.0, 1.0, grad=True)
    loss, metrics = reward_model_loss(chosen, row(1.0, 1.0))
    loss.backward()
    assert loss.item() == pytest.approx(0.410038, abs=1e-6)  # (softplus(−2) + softplus(0)) / 2
    assert chosen.grad is not None and chosen.grad.tolist() == pytest.approx([-0.059601, -0.25], abs=1e-6)
    assert metrics["accuracy"].item() == 0.5 and metrics["margin"].item() == 1.0


def _dpo_batch(prompts: int, negatives: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(prompts,), (prompts, negatives)] * 2
    chosen, rejected, ref_chosen, ref_rejected = (20 * torch.randn(s, generator=generator) - 60 for s in shapes)
    return chosen, rejected, ref_chosen, ref_rejected


def _dpo(a: Tensor, b: Tensor) -> tuple[Tensor, Metrics]:
    reference = torch.full_like(a, -50.0)
    return dpo_loss(
        a,
        torch.stack([b, 0.9 * a.detach()], dim=1),
        reference,
        torch.stack([reference, reference], dim=1),
        beta=0.1,
        margins=torch.stack([b.detach() + 60, -30 * (b.detach() + 60)], dim=1),
        rejected_mask=torch.stack([torch.ones_like(a, dtype=torch.bool), a.detach() > -60], dim=1),
    )


def _ple(a: Tensor, b: Tensor) -> tuple[Tensor, Metrics]:
    tokens = (2 - a.detach() / 3).int(), (3 - b.detach() / 4).int()
    return ple_loss(a, b, *tokens, a.detach() / 40, b.detach() / 40, threshold=0.2)


def _sft(a: Tensor, b: Tensor) -> tuple[Tensor, Metrics]:
    return sft_loss(a + b, (3 - b.detach()).int())


@pytest.mark.parametrize("loss", [_dpo, _ple, _sft, reward_model_loss])
def test_sharding_changes_nothing(loss: Callable[[Tensor, Tensor], tuple[Tensor, Metrics]]) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (15 * torch.randn(6, generator=generator) - 60 for _ in range(2))

    def run(parts: list[slice]) -> tuple[float, Tensor, dict[str, float]]:
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        total, metrics = torch.zeros(()), dict[str, float]()
        for part in parts:
            value, named = loss(x[part], y[part])
            share = len(x[part]) / len(x)
            total = total + share * value
            for name, metric in named.items():
                assert not metric.requires_grad and metric.ndim == 0
                metrics[name] = metrics.get(name, 0.0) + share * metric.item()
        total.backward()
        assert x.grad is not None and y.grad is not None
        return total.item(), torch.stack([x.grad, y.grad]), metrics

    whole = run([slice(0, 6)])
    cut = run([slice(0, 1), slice(1, 3), slice(3, 6)])
    assert cut[0] == pytest.approx(whole[0], rel=1e-6)
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-6, atol=1e-8)
    assert cut[2] == pytest.approx(whole[2], rel=1e-5)
    assert whole[1].abs().sum() > 0


def test_half_precision_comes_out_in_fp32() -> None:
    logps = row(-300.5, -301.5).bfloat16()
    for loss, metrics in (sft_loss(logps, torch.tensor([7, 9])), reward_model_loss(logps, logps)):
        assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in metrics.values())
