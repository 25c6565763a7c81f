"""Requests that are asked together, decoded together: for runs that are to come out the same, byte by byte.

vLLM takes each request as it comes, so by chance the first ones of a batch are a step ahead of the others, and what is
decoded in one step decides the order of a matmul's sums. Here its scheduler waits until all of them are there, in their
order. `actors.engines.vllm` asks it in place of vLLM where the run is `deterministic`.
"""

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import RequestOutput

Request = dict[str, Any]


class Batches:
    """Collects the requests that begin in one turn of the event loop, as those of one call of a generator do, and has
    vLLM work on them alone; one batch after another.

    Args:
        llm: vLLM's `AsyncLLM`.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._asked: list[tuple[Request, asyncio.Future[RequestOutput]]] = []
        self._turn = asyncio.Lock()  # first come, first served
        self._tasks: set[asyncio.Task[None]] = set()

    async def final(self, **request: Any) -> "RequestOutput":
        """The last output of a request, by the keywords of `AsyncLLM.add_request`, of which only that is kept."""
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._begin)  # after all that this turn has yet to run
        answer: asyncio.Future[RequestOutput] = loop.create_future()
        self._asked.append((request, answer))
        return await answer

    def _begin(self) -> None:
        batch, self._asked = self._asked, []
        task = asyncio.create_task(self._work_on(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work_on(self, batch: "list[tuple[Request, asyncio.Future[RequestOutput]]]") -> None:
        async with self._turn:
            try:
                outputs = await self._answers([request for request, _ in batch])
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                return
            for (_, answer), output in zip(batch, outputs, strict=True):
                if not answer.done():  # whoever asked has given up
                    answer.set_result(output)

    async def _answers(self, requests: "list[Request]") -> "list[RequestOutput]":
        await self._llm.pause_generation(mode="wait", clear_cache=False)
        try:
            queues = [await self._llm.add_request(**request) for request in requests]
        finally:
            await self._llm.resume_generation()
        return [await queue.get() for queue in queues]
