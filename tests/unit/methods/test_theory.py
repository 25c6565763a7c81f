"""The theorem's σ1², σ2², ρ and λ: by hand on a linear model, against whole gradients on a real one, and bad input."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from plumbline.errors import DataError, ModelError
from plumbline.methods import theory
from plumbline.methods.theory import Projected, estimate, moments, needed
from plumbline.records import TokenGroup


class Linear(nn.Module):
    """S(x, y) = w·y for a response that is two numbers: its gradient is y itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))


def linear_logps(model: Linear, groups: Sequence[TokenGroup]) -> tuple[Tensor, Tensor]:
    responses = torch.tensor([group.response_ids for group in groups], dtype=torch.float32)
    return responses @ model.weight, torch.full(responses.shape[:2], 2)


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> Linear:
    monkeypatch.setattr(theory, "group_logps", linear_logps)
    return Linear()


def response(along: int, across: int = 0) -> list[int]:
    """β/2 times its gradient reaches −5·along in the direction (3, 4)/5, for β = 2."""
    return [-3 * along + 4 * across, -4 * along - 3 * across]


# Along the direction, in units of 5: chosen a, rejected b. The even rows have means 2 and 0, the odd ones 3 and 1.
ROWS = [(3, 1), (5, 2), (1, -1), (1, 0), (3, -1), (5, 2), (1, 1), (1, 0)]


def linear_groups() -> list[TokenGroup]:
    """What is across sums to zero in each half, so that both halves' mean gradients point along (3, 4)/5."""
    return [
        TokenGroup([0], [response(a, across=s), response(b, across=-s)])
        for (a, b), s in zip(ROWS, (1, 1, -1, -1, 2, 2, -2, -2), strict=True)
    ]


# What the estimates are


def test_a_linear_model_by_hand(linear: Linear) -> None:
    found = estimate(linear, linear_groups(), beta=2.0)
    # squares about each half's mean: a 4 + 16, b 4 + 4, their products 0 + 8; over 8 − 2, times 5²
    assert found.positive_variance == pytest.approx(25 * 20 / 6)
    assert found.negative_variance == pytest.approx(25 * 8 / 6)
    assert found.covariance == pytest.approx(25 * 8 / 6)
    assert found.correlation == pytest.approx(8 / math.sqrt(160))
    assert found.lam == pytest.approx(8 / (20 + 8 - 16))
    assert found.lam_given_positive == pytest.approx(2 / 3 * (1 - 64 / 160))
    assert found.agreement == pytest.approx(1.0)
    assert (found.prompts, found.negatives) == (8, 8)
    assert needed(found.lam, 2) == pytest.approx(4.0)  # (2/3) / (2/3 + 1/2 − 1)
    assert needed(found.lam_given_positive, 2) == math.inf  # λ is .4, and 2 is not below 1/.6


def test_beta_scales_the_variances_alone(linear: Linear) -> None:
    one, other = (estimate(linear, linear_groups(), beta=beta) for beta in (2.0, 0.2))
    assert other.positive_variance == pytest.approx(one.positive_variance / 100)
    assert (other.lam, other.correlation, other.lam_error) == pytest.approx((one.lam, one.correlation, one.lam_error))


def test_the_halves_that_disagree_are_told(linear: Linear) -> None:
    groups = linear_groups()
    for i in (1, 3, 5, 7):  # the odd half pulls across: a of 1 and b of −1 on (4, −3)/5, apart from what sums to zero
        groups[i] = TokenGroup([0], [response(0, across=-1 - i % 4), response(0, across=1)])
    assert estimate(linear, groups, beta=2.0).agreement == pytest.approx(0.0, abs=1e-6)


def test_moments_of_several_negatives_by_hand() -> None:
    half = [Projected(1.0, [4.0]), Projected(3.0, [1.0, 3.0]), Projected(5.0, [0.0, 0.0, 6.0])]
    # a about 3: −2, 0, 2. A prompt's mean b is 4, 2, 2, their mean 8/3; mean squares about it 16/9, 13/9, 76/9
    positive, negative, covariance = moments([half])
    assert positive == pytest.approx(8 / 2)
    assert negative == pytest.approx((16 / 9 + 13 / 9 + 76 / 9) / 2)
    assert covariance == pytest.approx((-2 * 4 / 3 + 0 + 2 * -2 / 3) / 2)
    # each half about its own mean: the same half a hundred higher changes nothing but the divisor
    higher = [Projected(one.positive + 100, [b - 100 for b in one.negatives]) for one in half]
    assert moments([half, higher]) == pytest.approx((positive, negative, covariance))


def test_the_standard_error_by_hand() -> None:
    half = [Projected(a, [b]) for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
    # Without (1, 1) a half has squares 8/3 and 8/3 and products −4/3, the other one 4, 4 and 0: λ = 20/(40 + 8). So it
    # is without (−1, −1); without the other two the products are 4/3 and λ = 20/(40 − 8). Their mean is 25/48 ± 5/48.
    assert theory._jackknife([half, half]) == pytest.approx(math.sqrt(7 / 8 * 8) * 5 / 48)


def test_a_real_model_against_whole_gradients(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(20, 200, (length,), generator=draw).tolist()

    groups = [TokenGroup(ids(5 + i), [ids(6), *(ids(3 + k) for k in range(1 + i % 3))]) for i in range(10)]
    found = estimate(model, groups, beta=0.3)
    assert all(parameter.grad is None for parameter in model.parameters())

    def gradient(prompt: list[int], answer: list[int]) -> Tensor:
        """−(β/2)∇S of one answer, of all weights in one row; S by the plain forward."""
        model.zero_grad()
        row = torch.tensor([prompt + answer])
        logps = model(row).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        (-0.15 * logps.gather(1, row[0, len(prompt) :, None]).sum()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()

    gradients = [[gradient(g.prompt_ids, answer) for answer in g.response_ids] for g in groups]
    means = [
        torch.stack([one[0] - torch.stack(one[1:]).mean(0) for one in gradients[half::2]]).mean(0) for half in (0, 1)
    ]
    a, b, weights = [], [], []  # every negative a row of its own, weighted so that prompts count alike
    for half in (0, 1):
        direction = means[1 - half] / means[1 - half].norm()
        rows = [(one[0] @ direction, r @ direction, 1 / (len(one) - 1)) for one in gradients[half::2] for r in one[1:]]
        x, y, w = torch.tensor(rows, dtype=torch.float64).T
        a.append(x - (w * x).sum() / 5)
        b.append(y - (w * y).sum() / 5)
        weights.append(w)
    x, y, w = torch.cat(a), torch.cat(b), torch.cat(weights)
    expected = [(w * one * other).sum().item() / 8 for one, other in ((x, x), (y, y), (x, y))]
    assert [found.positive_variance, found.negative_variance, found.covariance] == pytest.approx(expected, rel=1e-3)
    assert found.lam == pytest.approx(expected[1] / (expected[0] + expected[1] - 2 * expected[2]), rel=1e-3)
    cosine = means[0] @ means[1] / means[0].norm() / means[1].norm()
    assert found.agreement == pytest.approx(cosine.item(), rel=1e-3)
    assert found.negatives == 4 * 1 + 3 * 2 + 3 * 3


# What cannot be estimated


def test_gradients_without_variance_or_meaning_are_refused(linear: Linear) -> None:
    same = [TokenGroup([0], [response(2), response(1)])] * 8
    with pytest.raises(DataError, match="no variance"):
        estimate(linear, same, beta=2.0)
    with pytest.raises(DataError, match="mean gradient is zero"):
        estimate(linear, [TokenGroup([0], [response(1), response(1)])] * 8, beta=2.0)
    with pytest.raises(DataError, match="7 prompts are too few"):
        estimate(linear, same[:7], beta=2.0)
    with pytest.raises(ModelError, match="not finite"):
        estimate(linear, same, beta=math.inf)
