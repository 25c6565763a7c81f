"""Requests of one turn go to vLLM as one batch, in their order, while its scheduler waits."""

import asyncio
from typing import Any

import pytest

from actors.engines.vllm_batches import Batches


class Llm:
    """What `Batches` asks of `AsyncLLM`, and what it was asked, in order."""

    def __init__(self, refuses: str = "") -> None:
        self.did: list[str] = []
        self._refuses = refuses

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        await asyncio.sleep(0)
        self.did.append(f"pause: {mode}")

    async def resume_generation(self) -> None:
        self.did.append("resume")

    async def add_request(self, *, request_id: str) -> Any:
        await asyncio.sleep(0.01 if request_id.endswith("0") else 0)  # the first takes longest
        if request_id == self._refuses:
            raise ValueError(f"{request_id} is too long")
        self.did.append(request_id)
        queue: asyncio.Queue[str] = asyncio.Queue()
        queue.put_nowait(f"answer of {request_id}")
        return queue


async def asked(batches: Batches, *names: str) -> list[Any]:
    return await asyncio.gather(*(batches.final(request_id=name) for name in names), return_exceptions=True)


def test_what_begins_in_one_turn_is_one_batch_in_its_order() -> None:
    llm = Llm()

    async def work() -> list[Any]:
        batches = Batches(llm)
        first = asyncio.ensure_future(asked(batches, "a0", "a1", "a2"))
        await asyncio.sleep(0.005)  # the first batch is being handed over
        return [*await asked(batches, "b0", "b1"), *await first]

    answers = asyncio.run(work())
    assert llm.did == ["pause: wait", "a0", "a1", "a2", "resume", "pause: wait", "b0", "b1", "resume"]
    assert answers == [f"answer of {name}" for name in ("b0", "b1", "a0", "a1", "a2")]


def test_a_request_that_is_refused_fails_its_batch_and_vllm_goes_on() -> None:
    llm = Llm(refuses="a1")

    async def work() -> tuple[list[Any], list[Any]]:
        batches = Batches(llm)
        return await asked(batches, "a0", "a1"), await asked(batches, "b0")

    failed, after = asyncio.run(work())
    assert [str(error) for error in failed] == ["a1 is too long"] * 2
    assert after == ["answer of b0"] and llm.did.count("pause: wait") == llm.did.count("resume") == 2


def test_who_gives_up_leaves_the_others_their_answers() -> None:
    async def work() -> list[Any]:
        batches = Batches(Llm())
        one, other = (asyncio.ensure_future(batches.final(request_id=name)) for name in ("a0", "a1"))
        await asyncio.sleep(0.001)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        return [await other, *await asked(batches, "b0")]

    assert asyncio.run(work()) == ["answer of a1", "answer of b0"]
