"""What a proof promises in bfloat16: a damaged tensor at once, a wrong slot within three versions, no false alarm."""

import random

import pytest

from actors.proof import TOLERANCE, prove
from benchmarks.proof import BEYOND, IN_SLOTS, RESPONSES, TOKENS, rows
from plumbline.records import PolicyRef, Publication


@pytest.fixture(scope="module")
def table() -> list[dict]:
    """Steps of a hundredth of a nat, in a token's noise of as much: what was seen between kernels."""
    return rows(steps=[0.01], noises=[0.01], draws=10)


@pytest.mark.parametrize("damage", IN_SLOTS)
def test_a_damaged_tensor_is_noticed_at_once(table: list[dict], damage: str) -> None:
    [found] = [row for row in table if row["damage"] == damage]
    assert found["exact"] == 1


@pytest.mark.parametrize("damage", BEYOND)
def test_a_stuck_or_wrong_slot_is_noticed_within_three_versions(table: list[dict], damage: str) -> None:
    [found] = [row for row in table if row["damage"] == damage]
    assert found["log-probs"] is not None
    assert found["log-probs"] <= 3


def test_no_false_alarm_in_ten_thousand_proofs() -> None:
    """Of engines that hold what they should, whatever the noise and the step, with noise that grows by half."""
    draws = random.Random(0)
    for number in range(10_000):
        noise = draws.choice([0.0, 1e-3, 1e-2, 3e-2]) / TOKENS**0.5
        step = draws.choice([0.0, 1e-4, 1e-3, 1e-2, 1e-1])
        version = draws.randint(1, 50)
        base = [draws.uniform(-4, -1) for _ in range(RESPONSES)]
        way = [draws.gauss(0, step) for _ in base]
        previous = [b + (version - 1) * w for b, w in zip(base, way, strict=True)]
        now = [p + w + draws.gauss(0, step / 3) for p, w in zip(previous, way, strict=True)]
        offset = [draws.gauss(0, noise) for _ in base]

        def shown(values: list[float], noise: float, offset: list[float] = offset) -> list[float]:
            return [v + o + draws.gauss(0, noise) for v, o in zip(values, offset, strict=True)]

        publication = Publication(
            ref=PolicyRef(policy="ple", version=version),
            files={},
            probe_logps=now,
            previous_probe_logps=previous if version > 1 else base,
            base_probe_logps=base,
        )
        prove(
            publication,
            engine=f"of proof {number}",
            measured=shown(now, 1.5 * noise),
            base_measured=shown(base, noise),
            beside=shown(base, noise),
            tolerance=TOLERANCE["bfloat16"],
        )
