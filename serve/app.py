"""The endpoint itself, a FastAPI application: who asks, for what, which version that means, and what OpenAI would say.

It imports no engine. What comes from users is neither stored nor logged.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from plumbline.config.serving import Limits
from plumbline.errors import ModelError
from plumbline.records import Head, PolicyRef, UserRequest, public_name
from plumbline.runs.promotions import Catalog
from serve.admission import Admission, amounts
from serve.backends import Backend
from serve.errors import ApiError, from_engine, lost_model, unknown_model
from serve.keys import Keys
from serve.metrics import Call, Metrics
from serve.requests import Kind, check, read_body, read_object
from serve.responses import Form, as_chat
from serve.schema import describe

log = logging.getLogger(__name__)

BASE = PolicyRef()
VERSION_HEADER = "x-plumbline-version"
HUNG_UP = 499
"""How a request is counted whose user did not wait for the end."""


class Endpoint:
    """What the routes of one application share.

    Args:
        catalog: names and what they mean.
        backend: who answers.
    """

    def __init__(self, catalog: Catalog, backend: Backend, keys: Keys, limits: Limits) -> None:
        self.catalog, self.backend, self.keys, self.limits = catalog, backend, keys, limits
        self.metrics = Metrics()
        self.started = int(time.time())
        self.admission = Admission(limits)

    async def handle(self, kind: Kind | Literal["response"], request: Request) -> Response:
        """One chat, completion or response."""
        call = self.metrics.begin()
        left: Callable[[], None] | None = None
        try:
            caller = self.keys.check(request.headers.get("authorization")) or _address(request)
            # The place is taken afterwards: a body that never comes takes nobody's.
            body = await read_body(request.stream(), self.limits.body_bytes, self.limits.body_s)
            given = read_object(body)
            form = Form(given) if kind == "response" else None
            asked: Kind = "chat" if kind == "response" else kind
            name, fields = check(asked, as_chat(given) if form else given, self.limits)
            left = self.admission.enter(caller, amounts(fields))
            asks = UserRequest(kind=asked, body=fields, ref=BASE, caller=caller)
            response = await self._answer(asks, name, call, left, form)
        except BaseException as error:
            if left is not None:
                left()
            gone = isinstance(error, asyncio.CancelledError | ClientDisconnect)
            call.end(error.status if isinstance(error, ApiError) else HUNG_UP if gone else 500)
            raise
        if not isinstance(response, Stream):  # which is under way from now on
            left()
            call.end(200)
        return response

    async def _answer(
        self, request: UserRequest, name: str, call: Call, left: Callable[[], None], form: Form | None
    ) -> Response:
        """The answer of the version that `name` means, in its form; `left` is called at the end of a stream."""
        try:
            ref = self.catalog.resolve(name)
            digest = self.catalog.digest(ref)
        except KeyError:
            raise unknown_model(name[:64]) from None
        except ModelError as error:
            log.error("%s", error)
            raise lost_model(name) from None
        call.of(public_name(ref.policy), ref.version)
        answer = self.backend.answer(replace(request, ref=ref, digest=digest))
        try:
            head = await anext(answer)
            assert isinstance(head, Head)
            if head.streams:
                return Stream(answer, call, left, version_header(ref), form)
            text = "".join([str(piece) async for piece in answer])
        except BaseException:
            await aclose(answer)
            raise
        if head.status != 200:
            raise from_engine(head.status, text)
        call.first()
        call.tokens(json.loads(text).get("usage", {}).get("completion_tokens", 0))
        return Response(form.whole(text) if form else text, media_type="application/json", headers=version_header(ref))

    def models(self) -> list[dict[str, Any]]:
        """Base and the aliases, with the version that each means."""
        return [self.card(name, ref) for name, ref in self.catalog.aliases().items()]

    def card(self, name: str, ref: PolicyRef | None) -> dict[str, Any]:
        """A model as `/v1/models` shows it; `root` is the version that answers, null where that was lost."""
        root = ref and ref.public
        return {"id": name, "object": "model", "created": self.started, "owned_by": "plumbline", "root": root}


class Stream(StreamingResponse):
    """An answer that is sent piece by piece. However it ends, and if it never begins, its place is free afterwards.

    Args:
        answer: the pieces.
        ended: called once.
        form: of a response, which a chat answers.
    """

    def __init__(
        self,
        answer: AsyncIterator[Head | str],
        call: Call,
        ended: Callable[[], None],
        headers: Mapping[str, str],
        form: Form | None,
    ) -> None:
        pieces = self._pieces()
        super().__init__(form.events(pieces) if form else pieces, media_type="text/event-stream", headers=headers)
        self._answer, self._call, self._ended = answer, call, ended
        self._status = HUNG_UP  # unless it comes to its end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()
            self._call.end(self._status)
            await aclose(self._answer)

    async def _pieces(self) -> AsyncIterator[str]:
        try:
            async for piece in self._answer:
                self._call.first()
                self._call.tokens(1)
                yield str(piece)
            self._status = 200
        except ApiError as error:  # the status was sent: it can only be told in the stream
            self._status = error.status
            yield f"data: {json.dumps(error.body)}\n\n"


def _address(request: Request) -> str:
    """What tells callers without keys apart."""
    host = request.client.host if request.client else ""
    return hashlib.sha256(host.encode()).hexdigest()[:16]


def version_header(ref: PolicyRef) -> dict[str, str]:
    """Which version answered, whatever name was asked for."""
    return {VERSION_HEADER: ref.public}


async def aclose(answer: AsyncIterator[Any]) -> None:
    """End a generator that may not be at its end."""
    close = getattr(answer, "aclose", None)
    if close is not None:
        await close()


def build_app(endpoint: Endpoint) -> FastAPI:
    """The application over one endpoint."""
    app = FastAPI(title="Plumbline", description="Policies of a run, as OpenAI's API.", docs_url=None, redoc_url=None)

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> JSONResponse:
        said = f"Invalid URL ({request.method} {request.url.path})" if error.status_code == 404 else str(error.detail)
        return JSONResponse(ApiError(error.status_code, said).body, status_code=error.status_code)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        said = ApiError(500, "The server failed on this request; it is in its log.")
        return JSONResponse(said.body, status_code=500)

    @app.get("/health", summary="Whether requests can be answered")
    async def health() -> Response:
        ready = await endpoint.backend.ready()
        return JSONResponse({"status": "ok" if ready else "starting"}, status_code=200 if ready else 503)

    @app.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        endpoint.keys.check(request.headers.get("authorization"))
        return Response(generate_latest(endpoint.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", summary="Base and the aliases")
    async def models(request: Request) -> dict[str, Any]:
        endpoint.keys.check(request.headers.get("authorization"))
        return {"object": "list", "data": endpoint.models()}

    @app.get("/v1/models/{name}", summary="One model, by alias or pinned version", responses={404: {}})
    async def model(name: str, request: Request) -> dict[str, Any]:
        endpoint.keys.check(request.headers.get("authorization"))
        try:
            return endpoint.card(name, endpoint.catalog.resolve(name))
        except KeyError:
            raise unknown_model(name[:64]) from None
        except ModelError:
            return endpoint.card(name, None)

    @app.post("/v1/chat/completions", summary="Answer a conversation", **describe("chat", endpoint.limits))
    async def chat(request: Request) -> Response:
        return await endpoint.handle("chat", request)

    @app.post("/v1/responses", summary="Answer a text or a conversation", **describe("response", endpoint.limits))
    async def responses(request: Request) -> Response:
        return await endpoint.handle("response", request)

    @app.post("/v1/completions", summary="Continue a text", **describe("completion", endpoint.limits))
    async def completions(request: Request) -> Response:
        return await endpoint.handle("completion", request)

    return app
