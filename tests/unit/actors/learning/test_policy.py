"""The weights that a learner trains: what its probe measures, and in how many forward passes."""

from pathlib import Path

import pytest
import torch

from actors.learning.policy import load_model, probe_logps
from plumbline.config.data import Model
from plumbline.models.group_logps import sequence_logps
from plumbline.records import TokenGroup

PROBE = [TokenGroup([5, 6, 7], [[8, 9]]), TokenGroup([5], [[6, 7, 8], [9]]), TokenGroup([5, 6], [[7]])]


@pytest.mark.parametrize(("micro_tokens", "rows"), [(100, [13]), (5, [5, 5, 3]), (1, [5, 5, 3])])
def test_a_probe_keeps_to_the_tokens_of_a_forward(tiny_model: Path, micro_tokens: int, rows: list[int]) -> None:
    model = load_model(Model(path=str(tiny_model)), "float32").eval()
    with torch.no_grad():
        sums, tokens = sequence_logps(model, PROBE)
    expected = (sums[tokens > 0] / tokens[tokens > 0]).tolist()
    assert probe_logps(model, PROBE, 100) == pytest.approx(expected, rel=1e-4)  # it tries the model out, once
    seen: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    assert probe_logps(model, PROBE, micro_tokens) == pytest.approx(expected, rel=1e-4)
    assert sorted(seen, reverse=True) == rows


def test_without_a_probe_there_is_nothing(tiny_model: Path) -> None:
    assert probe_logps(None, [], 8) == []
