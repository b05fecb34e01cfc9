"""An HTTP endpoint that speaks OpenAI's protocol: chat completions and completions, with logprobs and streaming."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, TypeVar

from jaxtrain.sample.async_engine import AsyncEngine, StoppedError
from jaxtrain.sample.requests import FieldError
from jaxtrain.serve.load import Served
from jaxtrain.serve.protocol import Limits, read_call
from jaxtrain.serve.replies import FailedError, Reply, error_object

_T = TypeVar("_T")

_PLACES = "jaxtrain.places"  # of an ASGI scope


class _RefusedError(Exception):
    """A call that is answered with an error of another status than 400."""

    def __init__(self, status: int, kind: str, message: str):
        super().__init__(message)
        self.status, self.kind = status, kind


class _Queue:
    """An ASGI application with a bounded number of samples under way and waiting.

    A call takes one place before its body is read, and one for every further sample once that is known. It holds them
    until its response is over, however that ends.
    """

    def __init__(self, app: Any, most: int):
        self._app, self._most, self._taken = app, most, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        places = scope[_PLACES] = _Places(self)
        try:
            await self._app(scope, receive, send)
        finally:
            self._taken -= places.held

    def take(self, count: int) -> None:
        if self._taken + count > self._most:
            raise _RefusedError(
                503,
                "overloaded_error",
                f"the server has no room for {count} more samples beside {self._taken}; up to "
                f"{self._most} run and wait at a time: try again later",
            )
        self._taken += count


class _Places:
    """The places of one call."""

    def __init__(self, queue: _Queue):
        self._queue, self.held = queue, 0

    def take(self, count: int) -> None:
        self._queue.take(count)
        self.held += count


def make_app(
    served: Served, on_failure: Callable[[Exception], None] | None = None, limits: Limits | None = None
) -> Any:
    """The ASGI application. `on_failure` is called with what ended the engine, if anything does."""
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.requests import Request as Http
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    limits = limits or Limits()
    engine = AsyncEngine(served.engine, on_failure)

    def refusal(status: int, kind: str, message: str, param: str | None = None) -> Response:
        headers = {"Retry-After": "1"} if status == 503 else None
        return JSONResponse(error_object(message, kind, param), status_code=status, headers=headers)

    def answering(chat: bool):
        async def answer(http: Http) -> Response:
            try:
                http.scope[_PLACES].take(1)
                body = await _body(http, limits.body)
                call = await asyncio.to_thread(read_call, served, body, chat=chat, limits=limits)
                http.scope[_PLACES].take(call.request.params.n - 1)
            except FieldError as error:
                return refusal(400, "invalid_request_error", error.problem, error.field)
            except ValueError as error:
                return refusal(400, "invalid_request_error", str(error))
            except _RefusedError as error:
                return refusal(error.status, error.kind, str(error))
            except ClientDisconnect:
                return Response()  # nobody reads it
            reply, chunks = Reply(served, call), engine.stream(call.request)
            if call.stream:
                return StreamingResponse(reply.stream(chunks), media_type="text/event-stream")
            try:
                return JSONResponse(await _unless_left(http, reply.whole(chunks)))
            except (FailedError, StoppedError) as error:
                return refusal(500, "server_error", str(error))

        return answer

    async def models(_: Http) -> Response:
        model = {"id": served.name, "object": "model", "created": 0, "owned_by": "jaxtrain"}
        return JSONResponse({"object": "list", "data": [model]})

    async def failed(_: Http, error: Exception) -> Response:
        """The answer to a call whose handler raised. The server logs the traceback, and goes on."""
        return refusal(500, "server_error", f"{type(error).__name__}: {error}")

    app = Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/chat/completions", answering(True), methods=["POST"]),
            Route("/v1/completions", answering(False), methods=["POST"]),
        ],
        exception_handlers={Exception: failed},
    )
    return _Queue(app, limits.queue)


def listen(host: str, port: int) -> socket.socket:
    """The socket to `serve` at, taken before a model is loaded for nothing.

    Raises ValueError where a package is not installed, and for a place that cannot be listened at.
    """
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise ValueError("serving needs starlette and uvicorn: pip install 'jaxtrain[serve]'")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from error


def serve(served: Served, listening: socket.socket, limits: Limits | None = None) -> None:
    """Answer until interrupted. What ends the engine is raised once all who wait know of it, so that whoever watches
    over the server starts it anew."""
    import uvicorn

    failures: list[Exception] = []

    def stop(failure: Exception) -> None:
        failures.append(failure)
        server.should_exit = True

    server = uvicorn.Server(uvicorn.Config(make_app(served, stop, limits), log_level="warning"))
    with suppress(KeyboardInterrupt):  # which uvicorn raises again once it has shut down
        server.run(sockets=[listening])
    if failures:
        raise failures[0]


async def _body(http: Any, most: int) -> bytes:
    """The body of a call, read no further than is allowed. Raises _RefusedError for a longer one."""
    pieces, size = [], 0
    async for piece in http.stream():
        size += len(piece)
        if size > most:
            raise _RefusedError(413, "invalid_request_error", f"the body is longer than {most} bytes")
        pieces.append(piece)
    return b"".join(pieces)


async def _unless_left(http: Any, work: Coroutine[Any, Any, _T]) -> _T | None:
    """What `work` returns; None where the client of `http` hangs up before, and then `work` is cancelled."""

    async def left() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
