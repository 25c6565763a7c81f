"""Real actors on a local Ray: refs that pass unread, leases of a dead holder, our errors through Ray's."""

import asyncio
import subprocess
from typing import Any

import pytest
import ray

from actors.channel import Box, Channel
from actors.scorer import Query, ScorerSpec
from actors.spawn import ask, start_fleet
from plumbline.config.fleet import ScorerFleet
from plumbline.errors import ConfigError, LossError, RunError, SyncError
from plumbline.records import Completion, Generation, Message, PolicyRef, Publication


def get(ref: Any) -> Any:
    return ray.get(ref, timeout=30)


def publication(version: int, files: dict[str, bytes] | None = None) -> Publication:
    return Publication(
        ref=PolicyRef(policy="ple", version=version),
        files=files or {},
        probe_logps=[-1.0],
        previous_probe_logps=[-1.5],
        base_probe_logps=[-2.0],
        metrics={"loss": 0.5},
    )


def test_exit_codes_of_subprocesses_are_still_seen() -> None:
    """Ray's subreaper would make each of them 0 in this process."""
    assert subprocess.run(["sh", "-c", "exit 3"], check=False).returncode == 3


def test_a_boxed_ref_passes_through_a_channel_unread() -> None:
    channel: Any = ray.remote(Channel).options(num_cpus=0).remote(2)
    payload = ray.put(["sample"] * 3)
    ray.get([channel.reserve.remote(), channel.put.remote(1, Box(ref=payload)), channel.attach.remote("a", 0)])
    lease = get(channel.lease.remote("a"))
    assert isinstance(lease.box.ref, ray.ObjectRef)
    assert ray.get(lease.box.ref) == ["sample"] * 3


def test_what_a_dead_holder_had_leased_goes_to_the_next() -> None:
    channel: Any = ray.remote(Channel).options(num_cpus=0).remote(3)
    ray.get([channel.put.remote(step, Box(ref=ray.put(step))) for step in (1, 2)])
    ray.get(channel.attach.remote("first", 0))
    assert get(channel.lease.remote("first")).step == 1
    assert get(channel.lease.remote("first")).step == 2
    waiting = channel.lease.remote("first")  # it waits for step 3, and dies
    ray.get(channel.attach.remote("second", 1))
    assert get(waiting) is None
    again = get(channel.lease.remote("second"))
    assert (again.step, ray.get(again.box.ref)) == (2, 2)


def test_a_publication_reaches_whoever_waits_and_keeps_its_files() -> None:
    async def scenario() -> None:
        fleet = start_fleet(keep=2)
        waiting = fleet.store.wait.remote(PolicyRef(policy="ple", version=1))
        await fleet.store.publish.remote(publication(1, {"weights": b"123"}))
        assert (await waiting).files == {}
        assert (await fleet.store.fetch.remote(PolicyRef(policy="ple", version=1))).files == {"weights": b"123"}
        fleet.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [LossError("the loss became nan"), SyncError("ple", 3, "generator-0", 0.5, "no")])
def test_our_errors_come_out_of_ray_as_themselves(error: Exception) -> None:
    async def scenario() -> None:
        fleet = start_fleet(keep=2)
        await fleet.store.fail.remote("ple", error)
        try:
            with pytest.raises(type(error)) as caught:
                await ask(fleet.store.wait.remote(PolicyRef(policy="ple", version=9)))
            assert str(caught.value) == str(error)
        finally:
            fleet.close()

    asyncio.run(scenario())


def test_a_scorer_reads_a_ref_that_its_caller_never_read() -> None:
    async def scenario() -> None:
        fleet = start_fleet(keep=2)
        [scorer] = fleet.add_scorers(ScorerFleet(gpus=0), ScorerSpec(function="plumbline.miniature.reward:score"))
        query = Query(
            messages=(
                Message(role="user", content="Please tell me about the looks and the talents of the moss for my blog."),
            ),
            extra={},
        )
        completions = tuple(Completion(text=t, ids=[1], finish_reason="stop") for t in ("The moss is nice.", "  "))
        drawn = ray.put([Generation(key="a", ref=PolicyRef(), engine="g", completions=completions)])
        [[scored, blank]] = (await ask(scorer.score_generations.remote([query], drawn))).values
        assert scored == scored and blank != blank  # a number, and nan
        ray.kill(scorer)
        fleet.close()

    asyncio.run(scenario())


def test_a_reward_that_cannot_be_loaded_says_so() -> None:
    async def scenario() -> None:
        fleet = start_fleet(keep=2)
        [scorer] = fleet.add_scorers(ScorerFleet(gpus=0), ScorerSpec(function="no.such.module:score"))
        try:
            with pytest.raises((ConfigError, RunError), match=r"no\.such"):
                await ask(scorer.ready.remote())
        finally:
            fleet.close()

    asyncio.run(scenario())
