"""Who answers: engines of the endpoint's own, or the generators of a run that trains meanwhile."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Protocol

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from plumbline.records import Head, UserRequest
from serve.errors import ApiError

TRIES = 3
REFRESH_S = 1.0
LOST = ApiError(503, "The engine that began to answer was lost; ask again.", retry_after=1)


class Backend(Protocol):
    """Answers requests for versions; the first item is a Head, what follows are pieces of the body."""

    def answer(self, request: UserRequest) -> AsyncIterator[Head | str]:
        """Raises ApiError where nobody can answer now."""
        ...

    async def ready(self) -> bool:
        """Whether somebody can."""
        ...


class Replicas:
    """Engines that Ray Serve starts, scales and mends."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle.options(stream=True, method_name="answer")
        self._plain = handle.options(method_name="ready")

    async def answer(self, request: UserRequest) -> AsyncIterator[Head | str]:
        stream: Any = self._handle.remote(request)
        try:
            async for piece in stream:
                yield piece
        except BackPressureError:
            raise ApiError(429, "All engines are busy; try again.", code="rate_limit_exceeded", retry_after=1) from None
        except RayError:
            raise LOST from None
        finally:
            stream.cancel()

    async def ready(self) -> bool:
        response: Any = self._plain.remote()
        return bool(await response)


class Generators:
    """The generators of a run, the one with the fewest users next. Which there are, the run's store knows."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._handles: list[Any] = []
        self._asked = 0.0
        self._loads: Counter[Any] = Counter()

    async def answer(self, request: UserRequest) -> AsyncIterator[Head | str]:
        for left in reversed(range(TRIES)):
            begun = False
            try:
                async for piece in self._ask(await self._next(), request):
                    begun = True
                    yield piece
                return
            except (ActorDiedError, ActorUnavailableError):  # Ray restarts it; what was sent cannot be taken back
                self._asked = 0.0
                if begun or not left:
                    raise LOST from None
                await asyncio.sleep(0.5)

    async def ready(self) -> bool:
        return bool(await self._generators())

    async def _ask(self, generator: Any, request: UserRequest) -> AsyncIterator[Head | str]:
        self._loads[generator] += 1
        stream = generator.answer.options(num_returns="streaming", max_task_retries=0).remote(request)
        try:
            async for ref in stream:
                yield await ref
        finally:
            self._loads[generator] -= 1
            with contextlib.suppress(RayError, TypeError, ValueError):
                ray.cancel(stream)  # a user who hung up, for instance

    async def _next(self) -> Any:
        handles = await self._generators()
        if not handles:
            raise ApiError(503, "No generator is there at the moment; try again.", retry_after=5)
        return min(handles, key=lambda handle: self._loads[handle])

    async def _generators(self) -> list[Any]:
        if time.monotonic() - self._asked > REFRESH_S:
            self._handles = await self._store.generators.remote()
            self._asked = time.monotonic()
        return self._handles
