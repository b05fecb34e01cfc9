"""An HTTP server with OpenAI's API: chat completions and completions, with logprobs and streaming."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, TypeVar

from jaxtrain.sample.async_engine import AsyncEngine, StoppedError
from jaxtrain.sample.requests import FieldError
from jaxtrain.serve.protocol import Limits, read_call
from jaxtrain.serve.responses import FailedError, ResponseBuilder, error_object
from jaxtrain.serve.served import Served

_T = TypeVar("_T")

_PERMITS = "jaxtrain.permits"  # key of the ASGI scope


class _RefusedError(Exception):
    """A call that is answered with an error status other than 400."""

    def __init__(self, status: int, kind: str, message: str):
        super().__init__(message)
        self.status, self.kind = status, kind


class _AdmissionControl:
    """An ASGI application with a bounded number of running and waiting samples.

    A call acquires one permit before its body is read, and one for every further sample once their number is known.
    It releases them when its response has ended, normally or not.
    """

    def __init__(self, app: Any, limit: int):
        self._app, self._limit, self._acquired = app, limit, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        permits = scope[_PERMITS] = _Permits(self)
        try:
            await self._app(scope, receive, send)
        finally:
            self._acquired -= permits.acquired

    def acquire(self, count: int) -> None:
        if self._acquired + count > self._limit:
            raise _RefusedError(
                503,
                "overloaded_error",
                f"the server cannot accept {count} more samples: {self._acquired} are running or waiting, and the "
                f"maximum is {self._limit}; try again later",
            )
        self._acquired += count


class _Permits:
    """The permits of one call."""

    def __init__(self, control: _AdmissionControl):
        self._control, self.acquired = control, 0

    def acquire(self, count: int) -> None:
        self._control.acquire(count)
        self.acquired += count


def make_app(
    served: Served, on_failure: Callable[[Exception], None] | None = None, limits: Limits | None = None
) -> Any:
    """The ASGI application. `on_failure` is called with the exception that stopped the engine, if there is one."""
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
                http.scope[_PERMITS].acquire(1)
                body = await _body(http, limits.body)
                call = await asyncio.to_thread(read_call, served, body, chat=chat, limits=limits)
                http.scope[_PERMITS].acquire(call.request.params.n - 1)
            except FieldError as error:
                return refusal(400, "invalid_request_error", error.problem, error.field)
            except ValueError as error:
                return refusal(400, "invalid_request_error", str(error))
            except _RefusedError as error:
                return refusal(error.status, error.kind, str(error))
            except ClientDisconnect:
                return Response()  # the client is gone
            response, chunks = ResponseBuilder(served, call), engine.stream(call.request)
            if call.stream:
                return StreamingResponse(response.stream(chunks), media_type="text/event-stream")
            try:
                return JSONResponse(await _unless_disconnected(http, response.build(chunks)))
            except (FailedError, StoppedError) as error:
                return refusal(500, "server_error", str(error))

        return answer

    async def models(_: Http) -> Response:
        model = {"id": served.name, "object": "model", "created": 0, "owned_by": "jaxtrain"}
        return JSONResponse({"object": "list", "data": [model]})

    async def failed(_: Http, error: Exception) -> Response:
        """The response to a call whose handler raised. Starlette logs the traceback, and the server continues."""
        return refusal(500, "server_error", f"{type(error).__name__}: {error}")

    app = Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/chat/completions", answering(True), methods=["POST"]),
            Route("/v1/completions", answering(False), methods=["POST"]),
        ],
        exception_handlers={Exception: failed},
    )
    return _AdmissionControl(app, limits.queue)


def listen(host: str, port: int) -> socket.socket:
    """Open the socket for `serve`, before time is spent on loading a model.

    Raises ValueError if a package is not installed, or if it cannot listen on the address.
    """
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise ValueError("serving needs starlette and uvicorn: pip install 'jaxtrain[serve]'")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error


def serve(served: Served, listening: socket.socket) -> None:
    """Answer until interrupted. What ends the engine is raised once all who wait know of it, so that whoever watches
    over the server starts it anew."""
    import uvicorn

    failures: list[Exception] = []

    def stop(failure: Exception) -> None:
        failures.append(failure)
        server.should_exit = True

    server = uvicorn.Server(uvicorn.Config(make_app(served, stop), log_level="warning"))
    with suppress(KeyboardInterrupt):  # which uvicorn raises again once it has shut down
        server.run(sockets=[listening])
    if failures:
        raise failures[0]


async def _body(http: Any, limit: int) -> bytes:
    """Read the body of a call. Raises _RefusedError as soon as it exceeds `limit` bytes."""
    pieces, size = [], 0
    async for piece in http.stream():
        size += len(piece)
        if size > limit:
            raise _RefusedError(413, "invalid_request_error", f"the body is longer than {limit} bytes")
        pieces.append(piece)
    return b"".join(pieces)


async def _unless_disconnected(http: Any, work: Coroutine[Any, Any, _T]) -> _T | None:
    """The result of `work`; if the client of `http` disconnects first, cancel `work` and return None."""

    async def disconnected() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        waiting.cancel()
