"""The HTTP application: routes, the API key, limits, and ends of requests whose client is gone."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.contract.errors import CoreError
from core.server import errors
from core.server.config import ServerConfig
from core.server.protocol import ChatRequest, CompletionRequest
from core.server.service import ModelNotFound, Service, error_event

CLIENT_GONE = 499
"""Status in the log for a client that closed its connection; nobody receives it."""


def create_app(service: Service, config: ServerConfig) -> FastAPI:
    """The application of one engine."""
    app = FastAPI(title="core", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, api_key=config.api_key, max_body_bytes=config.max_body_bytes)
    _add_errors(app)

    @app.get("/health")
    async def health() -> Response:
        if service.engine.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse(
            errors.body(f"the engine stopped: {service.engine.failure}", "server_error"), status_code=503
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(service.models())

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        if body.stream:
            return await _streamed(request, service.stream_completion(body))
        return await _whole(request, service.complete(body))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        if body.stream:
            return await _streamed(request, service.stream_chat(body))
        return await _whole(request, service.chat(body))

    return app


def _add_errors(app: FastAPI) -> None:
    known = {*CompletionRequest.model_fields, *ChatRequest.model_fields}

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return JSONResponse(errors.of_validation(error.errors(), sorted(known)), status_code=400)

    @app.exception_handler(CoreError)
    async def failed(_: Request, error: CoreError) -> Response:
        status, found = errors.answer(error)
        return JSONResponse(found, status_code=404 if isinstance(error, ModelNotFound) else status)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        status, found = errors.answer(error)
        return JSONResponse(found, status_code=status)

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> Response:
        found = errors.body(str(error.detail), "invalid_request_error")
        return JSONResponse(found, status_code=error.status_code)


async def _whole(request: Request, work: Coroutine[Any, Any, Any]) -> Response:
    """The work's answer, or none if the client goes away before: then the work is cancelled."""
    done, value = await _unless_gone(request, work)
    return JSONResponse(value) if done else Response(status_code=CLIENT_GONE)


async def _streamed(request: Request, events: AsyncGenerator[bytes]) -> Response:
    """A stream whose first event is there, so that a request that fails at once gets a status of its own."""
    try:
        done, first = await _unless_gone(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    if not done:
        await events.aclose()
        return Response(status_code=CLIENT_GONE)

    async def rest() -> AsyncGenerator[bytes]:
        try:
            yield first
            async for event in events:
                yield event
        except Exception as error:
            yield error_event(error)
        finally:
            await events.aclose()

    return StreamingResponse(rest(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _unless_gone(request: Request, work: Awaitable[Any]) -> tuple[bool, Any]:
    """(True, result), or (False, None) where the client closed its connection first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return True, task.result()
        return False, None
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
                await asyncio.gather(one, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Gate:
    """In front of every route: the API key, and the size of a body, counted as it comes."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._limit = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 413, or let the request through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_guarded = scope["path"].startswith("/v1/")
        if is_guarded and self._key is not None:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._key):
                text = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
                await _refuse(401, errors.body(text, "authentication_error"), scope, receive, send)
                return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._limit:
            await _refuse(413, self._too_large(), scope, receive, send)
            return
        if is_guarded and scope["method"] == "POST":
            # Every body is JSON here, whatever a client calls it.
            kept = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope = {**scope, "headers": [*kept, (b"content-type", b"application/json")]}
        await self._app(scope, self._counted(receive), send)

    def _too_large(self) -> dict[str, Any]:
        return errors.body(f"the body is larger than {self._limit} bytes", "invalid_request_error")

    def _counted(self, receive: Receive) -> Callable[[], Awaitable[Message]]:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise HTTPException(413, self._too_large()["error"]["message"])
            return message

        return counted


async def _refuse(status: int, found: dict[str, Any], scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(found, status_code=status)(scope, receive, send)
