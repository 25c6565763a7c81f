"""The proof that a version arrived, against every way of not arriving; and the store that holds versions."""

import asyncio
import math
import pickle
import random
from collections.abc import Sequence

import pytest

from actors.weights import TOLERANCE, PolicyStore, Proof, prove
from plumbline.errors import LossError, PlumblineError, SyncError
from plumbline.records import PolicyRef, Publication

BASE = (-2.0, -3.0, -1.5, -4.0)
V1 = (-1.9, -3.1, -1.3, -4.0)
V2 = (-1.7, -3.2, -1.0, -3.9)


def ple(version: int) -> PolicyRef:
    return PolicyRef(policy="ple", version=version)


def published(version: int, probe: Sequence[float], previous: Sequence[float]) -> Publication:
    return Publication(
        ref=ple(version), files={}, probe_logps=probe, previous_probe_logps=previous, base_probe_logps=BASE
    )


SECOND = published(2, V2, V1)


def proof(
    measured: Sequence[float],
    publication: Publication = SECOND,
    reference: PolicyRef | None = None,
    reference_measured: Sequence[float] = V1,
    tolerance: float = TOLERANCE["float32"],
) -> Proof:
    return prove(
        publication,
        engine="generator-1",
        measured=measured,
        reference=reference or ple(1),
        reference_measured=reference_measured,
        tolerance=tolerance,
    )


def refusal(measured: Sequence[float], tolerance: float = TOLERANCE["float32"]) -> SyncError:
    with pytest.raises(SyncError) as caught:
        proof(measured, tolerance=tolerance)
    error = caught.value
    assert (error.policy, error.version, error.engine) == ("ple", 2, "generator-1")
    assert str(error).startswith("ple v000002 did not arrive at engine generator-1: ")
    return error


def shifted(values: Sequence[float], step: Sequence[float], by: float) -> list[float]:
    """`values` moved by a multiple of the way from V1 to `step`."""
    return [v + by * (s - b) for v, s, b in zip(values, step, V1, strict=True)]


# What passes


def test_the_learners_own_values_pass() -> None:
    passed = proof(V2)
    assert passed == Proof(ref=ple(2), engine="generator-1", difference=0.0, drift=passed.drift)
    assert passed.drift == pytest.approx(1.0)


def test_a_first_version_is_measured_from_the_base() -> None:
    passed = proof(V1, published(1, V1, BASE), PolicyRef(), BASE)
    assert passed.drift == pytest.approx(1.0)


def test_an_engine_that_never_served_the_previous_version_is_measured_from_the_base() -> None:
    """A restarted one: it goes from the base to version 2 at once."""
    assert proof(V2, reference=PolicyRef(), reference_measured=BASE).drift == pytest.approx(1.0)


def test_numerical_noise_within_the_tolerance_passes() -> None:
    """Log-probs in bfloat16 differ by about a hundredth of a nat between kernels."""
    noise = random.Random(0)

    def noisy(values: Sequence[float]) -> list[float]:
        return [v + noise.gauss(0, 0.01) for v in values]

    passed = proof(noisy(V2), reference_measured=noisy(V1), tolerance=TOLERANCE["bfloat16"])
    assert 0.001 < passed.difference < 0.05
    assert passed.drift == pytest.approx(1.0, abs=0.2)


def test_a_step_that_drowns_in_noise_passes_and_says_so() -> None:
    tiny = [v + 0.002 for v in V1]
    off = [v + 0.01 * sign for v, sign in zip(V1, (1, -1, 1, -1), strict=True)]
    passed = proof(off, published(2, tiny, V1), reference_measured=off, tolerance=TOLERANCE["bfloat16"])
    assert math.isnan(passed.drift)
    assert passed.difference == pytest.approx(0.012)


# What does not


def test_an_engine_that_kept_the_old_version() -> None:
    error = refusal(V1)
    assert error.reason == "it still answers as ple@1"
    assert error.difference == pytest.approx(0.3)


def test_a_small_step_that_did_not_arrive_is_caught_though_its_values_are_within_the_tolerance() -> None:
    small = published(2, [v + 0.0005 for v in V1], V1)
    with pytest.raises(SyncError, match="still answers as ple@1"):
        proof(V1, small)
    assert proof([v + 0.0005 for v in V1], small).drift == pytest.approx(1.0)


def test_an_engine_that_loaded_nothing() -> None:
    """A no-op: after version 1 it answers as the base."""
    with pytest.raises(SyncError) as caught:
        proof(BASE)
    assert caught.value.difference == pytest.approx(0.5)


def test_a_no_op_at_the_first_version() -> None:
    with pytest.raises(SyncError, match=r"ple v000001 .* it still answers as base@0"):
        proof(BASE, published(1, V1, BASE), PolicyRef(), BASE)


def test_an_engine_that_loaded_another_adapter() -> None:
    wrong = [-2.5, -2.5, -2.5, -2.5]
    assert refusal(wrong).difference == pytest.approx(1.5)


def test_another_adapter_that_moved_as_far_along_the_way_is_caught_by_its_values() -> None:
    step = [b - a for a, b in zip(V1, V2, strict=True)]
    across = [-step[1], step[0], -step[3], step[2]]  # orthogonal to the step: the drift alone looks right
    wrong = [v + a for v, a in zip(V2, across, strict=True)]
    error = refusal(wrong)
    assert error.reason == "its probe log-probs are not the learner's within 0.001"
    assert error.difference == pytest.approx(0.3)


def test_an_engine_that_went_too_far() -> None:
    """Its adapter was scaled twice."""
    assert refusal(shifted(V1, V2, 2.0), tolerance=1.0).reason == (
        "it moved 2.00 times as far from ple@1 as the learner did"
    )


def test_an_engine_that_went_the_other_way() -> None:
    assert refusal(shifted(V1, V2, -1.0), tolerance=1.0).reason == (
        "it moved -1.00 times as far from ple@1 as the learner did"
    )


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_probs_that_are_not_finite(place: int, value: float) -> None:
    measured = [*V2[:place], value, *V2[place + 1 :]]
    assert refusal(measured).reason == "its probe log-probs are not finite"


def test_an_empty_probe_proves_nothing() -> None:
    with pytest.raises(SyncError):
        prove(
            Publication(ref=ple(1), files={}, probe_logps=[], previous_probe_logps=[], base_probe_logps=[]),
            engine="generator-1",
            measured=[],
            reference=PolicyRef(),
            reference_measured=[],
            tolerance=1.0,
        )


def test_another_probe_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="zip"):
        proof(V2[:3])


def test_a_sync_error_survives_pickling() -> None:
    error = refusal(V1)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is SyncError
    assert str(copy) == str(error)
    assert (copy.policy, copy.version, copy.engine, copy.difference) == ("ple", 2, "generator-1", error.difference)


# The store


def kept(version: int, content: bytes = b"weights") -> Publication:
    return Publication(
        ref=ple(version),
        files={"adapter_model.safetensors": content},
        probe_logps=V1,
        previous_probe_logps=BASE,
        base_probe_logps=BASE,
        metrics={"loss": 0.5},
    )


def test_fetch_gives_the_files_and_wait_does_not() -> None:
    async def scenario() -> None:
        store = PolicyStore(keep=2)
        await store.publish(kept(1))
        assert (await store.fetch(ple(1))).files == {"adapter_model.safetensors": b"weights"}
        waited = await store.wait(ple(1))
        assert (waited.files, waited.metrics, waited.ref) == ({}, {"loss": 0.5}, ple(1))

    asyncio.run(scenario())


def test_wait_ends_with_its_own_version() -> None:
    async def scenario() -> None:
        store = PolicyStore(keep=2)
        waiting = asyncio.get_running_loop().create_task(store.wait(ple(2)))
        await store.publish(kept(1))
        await asyncio.sleep(0)
        assert not waiting.done()
        await store.publish(kept(2))
        assert (await asyncio.wait_for(waiting, 1)).ref == ple(2)

    asyncio.run(scenario())


def test_only_the_newest_versions_are_kept_of_each_policy() -> None:
    async def scenario() -> None:
        store = PolicyStore(keep=2)
        other = PolicyRef(policy="dlma", version=1)
        await store.publish(
            Publication(ref=other, files={}, probe_logps=(), previous_probe_logps=(), base_probe_logps=())
        )
        for version in (1, 2, 3):
            await store.publish(kept(version))
        assert (await store.fetch(ple(2))).ref == ple(2)
        assert (await store.fetch(other)).ref == other
        with pytest.raises(KeyError, match="no published version ple@1"):
            await store.fetch(ple(1))

    asyncio.run(scenario())


def test_a_version_that_was_never_published() -> None:
    async def scenario() -> None:
        with pytest.raises(KeyError, match="no published version ple@1"):
            await PolicyStore(keep=2).fetch(ple(1))

    asyncio.run(scenario())


def test_publishing_again_changes_nothing() -> None:
    """A restarted learner publishes its checkpoint's version once more."""

    async def scenario() -> None:
        store = PolicyStore(keep=2)
        await store.publish(kept(1))
        await store.publish(kept(1, b"again"))
        assert (await store.fetch(ple(1))).files["adapter_model.safetensors"] == b"weights"

    asyncio.run(scenario())


def test_a_failed_policy_ends_the_wait_for_what_will_not_come() -> None:
    async def scenario() -> None:
        store = PolicyStore(keep=2)
        await store.publish(kept(1))
        waiting = asyncio.get_running_loop().create_task(store.wait(ple(2)))
        await asyncio.sleep(0)
        await store.fail("ple", LossError("the loss became nan"))
        with pytest.raises(LossError, match="became nan"):
            await asyncio.wait_for(waiting, 1)
        with pytest.raises(PlumblineError):
            await asyncio.wait_for(store.wait(ple(3)), 1)
        assert (await store.wait(ple(1))).ref == ple(1), "what was published stays"

    asyncio.run(scenario())
