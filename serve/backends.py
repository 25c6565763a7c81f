"""Who answers: engines of the endpoint's own, or the generators of a run that trains meanwhile."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Protocol

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import ReplicaState
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from actors.lost import GONE
from actors.spawn import unwrap
from plumbline.errors import SyncError
from plumbline.records import Head, UserRequest
from serve.errors import ApiError, unfit_model

log = logging.getLogger(__name__)

TRIES = 3
REFRESH_S = 1.0
READY_S = 2.0
"""After which a silent engine is looked for."""
LOOKS = 3
"""That must find none, one after another, before a user is told so: Ray Serve may be late to note one that answers."""
LOST = ApiError(503, "The engine that began to answer was lost; ask again.", retry_after=1)


def told(error: RayError, request: UserRequest) -> ApiError:
    """What a user is told of an engine's failure; the log says why."""
    cause = unwrap(error)
    log.error("%s", cause)
    return unfit_model(request.ref.public) if isinstance(cause, SyncError) else LOST


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
        self._name = handle.deployment_name
        self._handle = handle.options(stream=True, method_name="answer")
        self._plain = handle.options(method_name="ready")
        self._looked, self._running = 0.0, True

    async def answer(self, request: UserRequest) -> AsyncIterator[Head | str]:
        stream: Any = self._handle.remote(request)
        try:
            yield await self._first(stream)
            async for piece in stream:
                yield piece
        except BackPressureError:
            raise ApiError(429, "All engines are busy; try again.", code="rate_limit_exceeded", retry_after=1) from None
        except RayError as error:
            raise told(error, request) from None
        finally:
            stream.cancel()

    async def ready(self) -> bool:
        response: Any = self._plain.remote()
        try:
            return bool(await asyncio.wait_for(response, READY_S))
        except BackPressureError:
            return True
        except TimeoutError:  # they are busy, or none is there
            return await self._any_runs()
        except RayError:  # Ray Serve will start it anew
            return False
        finally:
            response.cancel()

    async def _first(self, stream: Any) -> Head | str:
        """The first piece, however long it takes as long as an engine is there."""
        first = asyncio.ensure_future(anext(stream))
        try:
            missed = 0
            while not (await asyncio.wait({first}, timeout=READY_S))[0]:
                missed = 0 if await self._any_runs() else missed + 1
                if missed == LOOKS:
                    raise ApiError(503, "No engine is there at the moment; try again.", retry_after=5)
            return await first
        finally:
            first.cancel()

    async def _any_runs(self) -> bool:
        if time.monotonic() - self._looked > REFRESH_S:
            self._looked = time.monotonic()
            with contextlib.suppress(RayError, RayServeException):  # its controller is being started anew
                self._running = await asyncio.to_thread(self._look)
        return self._running

    def _look(self) -> bool:
        app = serve.status().applications[serve.get_replica_context().app_name]
        return app.deployments[self._name].replica_states.get(ReplicaState.RUNNING, 0) > 0


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
            except GONE:  # Ray restarts it; what was sent cannot be taken back
                self._asked = 0.0
                if begun or not left:
                    raise LOST from None
                await asyncio.sleep(0.5)
            except RayError as error:
                raise told(error, request) from None

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
