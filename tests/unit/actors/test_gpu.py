"""What GPUs do, as NVML would tell it: means since somebody asked last, and nothing where there is nothing."""

import importlib.util
from typing import Any

import pytest
import torch

from actors.gpu import GpuUse, GpuWatch, mean_use


def test_means_since_the_last_question_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, taken = {0: 40, 1: 100}, {0: 2 * 2**30, 1: 6 * 2**30}
    monkeypatch.setattr(torch.cuda, "utilization", busy.get)
    monkeypatch.setattr(torch.cuda, "device_memory_used", taken.get)
    watch = GpuWatch()
    begun = watch.use
    watch.sample(2)
    first = watch.use
    busy[0] = taken[0] = 0
    watch.sample(2)
    assert first.since(begun) == {"gpu_busy": pytest.approx(0.7), "gpu_gib": 4.0}
    assert watch.use.since(first) == {"gpu_busy": pytest.approx(0.5), "gpu_gib": 3.0}
    assert watch.use.since(begun) == {"gpu_busy": pytest.approx(0.6), "gpu_gib": 3.5}
    assert watch.use.since(watch.use) == {}, "no sample since"


def test_a_mean_over_those_that_were_there_and_have_a_card() -> None:
    none, some = GpuUse(), GpuUse(samples=2, busy=1.0, gib=20.0)
    more = GpuUse(samples=4, busy=2.8, gib=40.0)
    assert mean_use({"a": none, "b": some}, {"a": some, "b": more, "new": more}) == {
        "gpu_busy": pytest.approx((0.5 + 0.9) / 2),
        "gpu_gib": 10.0,
    }
    assert mean_use({"a": more}, {"a": some}) == {}, "it was started again"
    assert mean_use({"a": none}, {"a": none}) == mean_use({}, {"a": some}) == {}


@pytest.mark.parametrize("bindings", [False, True])
def test_without_bindings_or_cards_nothing_is_watched(bindings: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if bindings else None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: asked.append(1) or 0)
    assert GpuWatch().use == GpuUse() and len(asked) == bindings
