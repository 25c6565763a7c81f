"""GiB of processes, worked by hand."""

from typing import Any

import pytest

from plumbline.config.fleet import GeneratorFleet
from plumbline.config.pipelines import Ple
from plumbline.placement.memory import CONTEXT_GIB, ENGINE_GIB, GIB, engine_need, kv_bytes, learner_need
from plumbline.placement.sizes import Shape

ONE = Shape(parameters=GIB, layers=2, hidden=1024, intermediate=2048, heads=8, kv_heads=2, head_dim=128, vocab=1000)
"""As many numbers as there are bytes in a GiB: GiB are bytes a number."""


def states(policy: str = "full", width: int = 2, workers: int = 1, **learner: Any) -> float:
    """Without the process, whose activations one token makes as good as none."""
    settings = {"micro_tokens": 1, **learner}
    section = Ple.model_validate({"type": "ple", "policy": {"type": policy}, "learner": settings})
    return learner_need(section, ONE, width, workers, cuda=True).gib - CONTEXT_GIB


@pytest.mark.parametrize(
    ("width", "learner", "gib"),
    [
        (2, {}, 2 + 4 + 4 + 8 + 4 + 2),  # weights, masters, sums of gradients, moments; a step's copies; published
        (4, {}, 4 + 4 + 8 + 4 + 4),  # float32 needs no masters
        (2, {"optimizer": "rmsprop"}, 2 + 4 + 4 + 4 + 4 + 2),
    ],
)
def test_all_weights(width: int, learner: dict[str, Any], gib: float) -> None:
    assert states(width=width, **learner) == pytest.approx(gib, abs=1e-3)


@pytest.mark.parametrize(
    ("zero", "gib"),
    [
        (1, 2 + 12 / 4 + 4 + 4 / 4),  # the optimiser is cut over the four
        (2, 2 + 12 / 4 + 4 / 4 + 4 / 4),  # gradients too
        (3, 2 / 4 + 12 / 4 + 4 / 4 + 4 / 4 + 2 * 1e9 / GIB),  # weights too, but those that are gathered
    ],
)
def test_zero_cuts_over_workers(zero: int, gib: float) -> None:
    buckets = 2 * 2**26 * 2 / GIB
    assert states(workers=4, strategy="deepspeed", zero=zero) == pytest.approx(gib + buckets, abs=1e-3)


def test_an_adapter_is_trained_beside_frozen_weights() -> None:
    adapter = ONE.adapter(8) / GIB
    assert states("lora") == pytest.approx(2 + adapter * (2 + 4 + 4 + 8 + 4), abs=1e-3)


def test_activations_by_the_token() -> None:
    """Of a layer 12 vectors of 1024 and 4 of 2048, 2 bytes each; with checkpointing layers' inputs, and one layer."""
    tokens = 2**20
    layer = (12 * 1024 + 4 * 2048) * 2
    head = 4 * 4 * 2**26 / GIB
    assert states("lora", micro_tokens=tokens) == pytest.approx(
        2 + ONE.adapter(8) * 18 / GIB + tokens * 2 * layer / GIB + head
    )
    assert states("lora", micro_tokens=tokens, gradient_checkpointing=True) == pytest.approx(
        2 + ONE.adapter(8) * 18 / GIB + tokens * (2 * 1024 * 2 + layer) / GIB + head
    )


def test_an_engine_over_two_cards() -> None:
    settings = GeneratorFleet(max_num_seqs=100)
    assert kv_bytes(ONE, 2) == 2 * 2 * 2 * 128 * 2
    sequence = 1024 * kv_bytes(ONE, 2) / GIB
    need = engine_need(settings, 1024, ONE, 2, (3, 8), cards=2)
    weights = (2 + 3 * ONE.adapter(8) * 2 / GIB) / 2
    assert need.weights == pytest.approx(weights)
    assert need.least == pytest.approx(weights + 8 * sequence / 2 + ENGINE_GIB + CONTEXT_GIB)
    assert need.most == pytest.approx(weights + 100 * sequence / 2 + ENGINE_GIB + CONTEXT_GIB)
