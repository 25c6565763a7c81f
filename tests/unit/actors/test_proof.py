"""The proof that a version arrived, against every way of not arriving, in float32 and in bfloat16's noise."""

import math
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.proof import TOLERANCE, Proof, prove, tolerance_of
from plumbline.config.tree import Config
from plumbline.errors import SyncError
from plumbline.records import PolicyRef, Publication
from tests.tiny import tiny_config

N = 16
draws = random.Random(0)
BASE = [draws.uniform(-4, -1) for _ in range(N)]
V1 = [b + draws.gauss(0, 0.1) for b in BASE]
V2 = [v + draws.gauss(0, 0.2) for v in V1]
DIGESTS = {f"model.layers.{i}.self_attn.{name}": f"{i}{name}" for i in (0, 1) for name in ("q_proj", "k_proj")}


def ple(version: int) -> PolicyRef:
    return PolicyRef(policy="ple", version=version)


def published(version: int, probe: Sequence[float], previous: Sequence[float]) -> Publication:
    return Publication(
        ref=ple(version), files={}, probe_logps=probe, previous_probe_logps=previous, base_probe_logps=BASE
    )


SECOND = published(2, V2, V1)


def proof(measured: Sequence[float], publication: Publication = SECOND, **changes: Any) -> Proof:
    settings: dict[str, Any] = {"base_measured": BASE, "tolerance": TOLERANCE["float32"], **changes}
    return prove(publication, engine="generator-1", measured=measured, **settings)


def refusal(measured: Sequence[float], publication: Publication = SECOND, **changes: Any) -> SyncError:
    with pytest.raises(SyncError) as caught:
        proof(measured, publication, **changes)
    error = caught.value
    version = publication.ref.version
    assert (error.policy, error.version, error.engine) == ("ple", version, "generator-1")
    assert str(error).startswith(f"ple v{version:06d} did not arrive at engine generator-1: ")
    return error


def moved(start: Sequence[float], end: Sequence[float], by: float) -> list[float]:
    """`start` moved by a multiple of the way to `end`."""
    return [a + by * (b - a) for a, b in zip(start, end, strict=True)]


# What passes


def test_the_learners_own_values_pass() -> None:
    passed = proof(V2)
    assert passed == Proof(ref=ple(2), engine="generator-1", difference=0.0, drift=passed.drift, exact=0)
    assert passed.drift == pytest.approx(1.0)


def test_a_first_version_is_measured_from_the_base() -> None:
    assert proof(V1, published(1, V1, BASE)).drift == pytest.approx(1.0)


def test_what_an_engine_differs_by_at_the_base_is_no_difference_of_a_version() -> None:
    """Other kernels: it is off by the same wherever it is asked."""
    off = [0.0005 * (-1) ** i for i in range(N)]
    now, at_base = ([v + o for v, o in zip(values, off, strict=True)] for values in (V2, BASE))
    passed = proof(now, base_measured=at_base)
    assert passed.difference == pytest.approx(0.0005)
    assert passed.drift == pytest.approx(1.0)


def test_a_step_that_drowns_in_noise_passes_and_says_so() -> None:
    noisy = random.Random(1)
    tiny = [b + 0.0002 * (-1) ** i for i, b in enumerate(BASE)]
    at_base, now = ([v + noisy.gauss(0, 0.01) for v in values] for values in (BASE, tiny))
    passed = proof(now, published(1, tiny, BASE), base_measured=at_base, tolerance=TOLERANCE["bfloat16"])
    assert math.isnan(passed.drift)


@pytest.mark.parametrize(
    ("size", "spread", "growth"),
    [(16, 0.5, 1), (16, 2, 1), (64, 0.5, 1), (64, 2, 1), (64, 0.5, 2), (64, 2, 2), (64, 0.5, 4), (64, 1, 4)],
)
def test_noise_of_the_learner_is_no_step_that_an_engine_must_show(size: int, spread: float, growth: float) -> None:
    """Each measurement has noise of its own: the learner's less or more than the engine's, and it grows in training."""
    noisy = random.Random(2)

    def seen(noise: float) -> list[float]:
        return [value + noisy.gauss(0, noise) for value in truth]

    truth = [noisy.uniform(-4, -1) for _ in range(size)]
    for version in [1, 2] * 150:
        learner = 0.004 * spread
        before = seen(learner)
        published = Publication(
            ref=ple(version),
            files={},
            probe_logps=seen(growth * learner),
            previous_probe_logps=seen(growth * learner) if version > 1 else before,
            base_probe_logps=before,
        )
        proof(seen(growth * 0.004), published, base_measured=seen(0.004), tolerance=TOLERANCE["bfloat16"])


# What does not, by its log-probs


def test_an_engine_that_kept_the_old_version() -> None:
    error = refusal(V1)
    assert error.reason == "it still answers as ple@1"
    assert error.difference == pytest.approx(max(abs(a - b) for a, b in zip(V1, V2, strict=True)))


def test_a_small_step_that_did_not_arrive_is_caught_though_its_values_are_within_the_tolerance() -> None:
    small = published(2, moved(V1, V2, 0.0005), V1)
    assert refusal(V1, small).reason == "it still answers as ple@1"
    assert proof(moved(V1, V2, 0.0005), small).drift == pytest.approx(1.0)


def test_an_engine_that_loaded_nothing() -> None:
    assert refusal(BASE).reason == "it still answers as base@0"
    assert refusal(BASE, published(1, V1, BASE)).reason == "it still answers as base@0"


def test_an_engine_that_loaded_another_adapter() -> None:
    refusal([-2.5] * N)


def test_another_adapter_that_moved_as_far_along_the_way_is_caught_by_its_values() -> None:
    way = [b - a for a, b in zip(BASE, V2, strict=True)]
    across = [w * (-1) ** i for i, w in enumerate(way)]
    along = sum(a * w for a, w in zip(across, way, strict=True)) / sum(w * w for w in way)
    wrong = [v + a - along * w for v, a, w in zip(V2, across, way, strict=True)]
    assert refusal(wrong, published(1, V2, BASE)).reason.startswith("its probe log-probs moved otherwise")


def test_values_that_are_off_by_the_same_everywhere() -> None:
    """No way, no noise: it differed at the base already, by more than numbers do."""
    error = refusal([v + 0.5 for v in V2], base_measured=[b + 0.5 for b in BASE])
    assert error.reason == "its probe log-probs are not the learner's within 0.001"


def test_an_engine_that_went_too_far_or_the_other_way() -> None:
    far = refusal(moved(V1, V2, 3.0), tolerance=10.0).reason
    assert far.startswith("it moved ")
    assert "times as far from" in far
    assert refusal(moved(BASE, V2, -1.0), tolerance=10.0).reason == (
        "it moved -1.00 times as far from base@0 as the learner did"
    )


def test_a_base_that_answers_as_the_version_beside_it() -> None:
    """Its adapter leaks into requests that name none: by a step that is far below the tolerance, too."""
    small = published(1, moved(BASE, V1, 0.1), BASE)
    proof(small.probe_logps, small, beside=BASE, tolerance=0.25)
    error = refusal(small.probe_logps, small, beside=small.probe_logps, tolerance=0.25)
    assert error.reason.startswith("beside it, the base answers otherwise, by 0.0")
    assert refusal(V2, beside=[*BASE[:-1], math.nan]).reason.startswith("beside it, the base answers otherwise")


@pytest.mark.parametrize("place", [0, 1, N - 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_probs_that_are_not_finite(place: int, value: float) -> None:
    assert refusal([*V2[:place], value, *V2[place + 1 :]]).reason == "its probe log-probs are not finite"


def test_an_empty_probe_proves_nothing() -> None:
    empty = Publication(ref=ple(1), files={}, probe_logps=[], previous_probe_logps=[], base_probe_logps=[])
    with pytest.raises(SyncError):
        prove(empty, engine="generator-1", measured=[], base_measured=[], tolerance=1.0)


def test_another_probe_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="zip"):
        proof(V2[:3])


# What does not, by its tensors


def test_tensors_that_are_the_learners_are_counted() -> None:
    assert proof(V2, expected=DIGESTS, held=[DIGESTS, DIGESTS]).exact == 4


def test_a_missing_tensor_is_named() -> None:
    missing = {name: one for name, one in DIGESTS.items() if name != "model.layers.1.self_attn.q_proj"}
    reason = refusal(V2, expected=DIGESTS, held=[DIGESTS, missing]).reason
    assert reason == "1 of 4 tensors in it are not the learner's (model.layers.1.self_attn.q_proj)"


def test_a_stale_tensor_and_one_that_the_learner_has_not() -> None:
    held = {**DIGESTS, "model.layers.0.self_attn.q_proj": "old", "model.layers.0.mlp.up_proj": "more"}
    reason = refusal(V2, expected=DIGESTS, held=[held]).reason
    assert reason.startswith(
        "2 of 4 tensors in it are not the learner's (model.layers.0.self_attn.q_proj, model.layers"
    )


def test_of_many_tensors_some_are_named() -> None:
    assert refusal(V2, expected=DIGESTS, held=[{}]).reason.endswith("model.layers.1.self_attn.q_proj and 1 more)")


def test_a_tensor_that_is_kept_in_another_form_is_neither_right_nor_wrong() -> None:
    assert proof(V2, expected=DIGESTS, held=[{**DIGESTS, "model.layers.0.self_attn.q_proj": None}]).exact == 3


@pytest.mark.parametrize(
    ("learner", "said", "dtype", "expected"),
    [
        ({}, None, "float32", 1e-3),
        ({}, None, "bfloat16", 0.25),
        ({"quantize": "nf4"}, None, "float32", 0.25),
        ({"quantize": "nf4"}, 0.1, "float32", 0.1),
    ],
)
def test_a_learner_in_four_bits_may_be_as_far_off_as_one_in_bfloat16(
    tmp_path: Path, learner: dict[str, str], said: float | None, dtype: str, expected: float
) -> None:
    tree = tiny_config(tmp_path)
    tree["pipelines"][0].setdefault("learner", {}).update(learner)
    tree.setdefault("fleet", {})["sync_tolerance"] = said
    assert tolerance_of(Config.model_validate(tree), dtype) == expected


def test_a_sync_error_survives_pickling() -> None:
    error = refusal(V1)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is SyncError
    assert str(copy) == str(error)
    assert (copy.policy, copy.version, copy.engine, copy.difference) == ("ple", 2, "generator-1", error.difference)
