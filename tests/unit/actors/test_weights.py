"""The store that holds versions."""

import asyncio

import pytest

from actors.channel import Box
from actors.weights import PolicyStore
from plumbline.errors import LossError, PlumblineError
from plumbline.records import PolicyRef, Publication

BASE = (-2.0, -3.0, -1.5, -4.0)
V1 = (-1.9, -3.1, -1.3, -4.0)


def ple(version: int) -> PolicyRef:
    return PolicyRef(policy="ple", version=version)


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


def test_boxes_of_whole_models_are_of_the_newest_two_and_of_the_learner_that_lives() -> None:
    async def scenario() -> None:
        store = PolicyStore(keep=9)
        for version in (1, 2, 3):
            await store.publish(kept(version), Box(ref=version))
        await store.publish(kept(3), Box(ref="anew"))
        boxes = [await store.box(ple(version)) for version in (1, 2, 3)]
        assert [box and box.ref for box in boxes] == [None, 2, "anew"]
        assert await store.box(PolicyRef(policy="dlma", version=1)) is None

    asyncio.run(scenario())
