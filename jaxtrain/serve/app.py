"""The endpoints: OpenAI's chat completions, completions and models, and health and metrics of the server."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from jaxtrain.sample.async_engine import AsyncEngine, StoppedError, StreamEndedError
from jaxtrain.sample.prompt_scores import PromptScores
from jaxtrain.sample.requests import Chunk, FieldError
from jaxtrain.serve.answers import ModelInfo, ModelList
from jaxtrain.serve.guard import Guard, refusal_response
from jaxtrain.serve.limits import PERMITS, Admission, Limits, Permits, RefusedError
from jaxtrain.serve.metrics import ServerMetrics
from jaxtrain.serve.openapi import openapi
from jaxtrain.serve.protocol import Call, read_call
from jaxtrain.serve.responses import FailedError, ResponseBuilder
from jaxtrain.serve.served import Served

_T = TypeVar("_T")

_READERS = 4  # threads that parse and tokenize calls
_UNREAD_BODIES = 8  # a body of up to this many times the maximum is received, unread, before it is refused


def make_app(
    served: Served,
    on_failure: Callable[[Exception], None] | None = None,
    limits: Limits | None = None,
    api_key: str | None = None,
) -> Any:
    """The ASGI application. `on_failure` is called with the exception that stopped the engine, if there is one."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.requests import Request as Http
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    limits = limits or Limits()
    engine = AsyncEngine(served.engine, on_failure)
    admission = Admission(limits)
    metrics = ServerMetrics(admission, served.engine.slots)
    # Threads of their own, so that long texts do not delay the responses to other calls.
    readers = ThreadPoolExecutor(_READERS, "jaxtrain-reader")

    async def read(http: Http, chat: bool) -> Call:
        """Read and validate a call, and acquire permits for its samples."""
        permits: Permits = http.scope[PERMITS]
        permits.acquire(1)
        body = await _body(http, limits, permits)
        work = asyncio.get_running_loop().run_in_executor
        try:
            call = await work(readers, lambda: read_call(served, body, chat=chat, limits=limits))
        finally:
            permits.drop_bytes()
        permits.acquire(call.samples - 1)
        return call

    async def prompt_scores(call: Call) -> list[PromptScores]:
        if not (call.echo and call.logprobs):
            return []
        alternatives = call.requests[0].params.alternatives
        return [await engine.score_prompt(request.prompt_ids, alternatives) for request in call.requests]

    def generated(call: Call) -> AsyncGenerator[Chunk]:
        requests = call.requests if call.generates else []
        chunks = engine.stream(*requests, seconds=limits.call_seconds, unread=limits.max_unread * call.samples)
        return metrics.counted(chunks, sum(len(request.prompt_ids) for request in call.requests))

    def answering(chat: bool) -> Callable[[Http], Coroutine[Any, Any, Response]]:
        async def answer(http: Http) -> Response:
            try:
                call = await read(http, chat)
            except FieldError as error:
                return refusal_response(RefusedError(400, "invalid_request_error", error.problem), error.field)
            except ValueError as error:
                return refusal_response(RefusedError(400, "invalid_request_error", str(error)))
            except RefusedError as error:
                return refusal_response(error)
            except ClientDisconnect:
                return Response()  # the client is gone
            try:
                scores = await prompt_scores(call)
                response, chunks = ResponseBuilder(served, call, scores), generated(call)
                if call.body.stream:
                    return StreamingResponse(response.stream(chunks), media_type="text/event-stream")
                body = await _unless_disconnected(http, response.build(chunks))
                return Response(body, media_type="application/json")
            except StreamEndedError as error:
                return refusal_response(RefusedError(504, "timeout_error", str(error)))
            except (FailedError, StoppedError) as error:
                return refusal_response(RefusedError(500, "server_error", str(error)))

        return answer

    async def models(_: Http) -> Response:
        return JSONResponse(ModelList(data=[ModelInfo(id=served.name)]).model_dump())

    async def model(http: Http) -> Response:
        name = http.path_params["model"]
        if name != served.name:
            problem = f"there is no model {name!r}; this server has {served.name!r}"
            return refusal_response(RefusedError(404, "invalid_request_error", problem), "model")
        return JSONResponse(ModelInfo(id=served.name).model_dump())

    async def description(_: Http) -> Response:
        return JSONResponse(openapi())

    async def health(_: Http) -> Response:
        if engine.stopped:
            return refusal_response(RefusedError(503, "server_error", "the engine has stopped"))
        return JSONResponse({"status": "ok"})

    async def metrics_text(_: Http) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    async def unknown(http: Http, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{http.method} {http.url.path}: {error.detail}"
        return refusal_response(RefusedError(error.status_code, "invalid_request_error", message))

    async def failed(_: Http, error: Exception) -> Response:
        """The response to a call whose handler raised. Starlette logs the traceback, and the server continues."""
        return refusal_response(RefusedError(500, "server_error", f"{type(error).__name__}: {error}"))

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = Starlette(
        routes=[
            Route("/openapi.json", description),
            Route("/v1/models", models),
            Route("/v1/models/{model:path}", model),
            Route("/v1/chat/completions", answering(True), methods=["POST"]),
            Route("/v1/completions", answering(False), methods=["POST"]),
            Route("/health", health),
            Route("/metrics", metrics_text),
        ],
        exception_handlers={HTTPException: unknown, Exception: failed},
        lifespan=lifespan,
    )
    return Guard(app, admission, metrics, api_key)


async def _body(http: Any, limits: Limits, permits: Permits) -> bytes:
    """Read the body of a call. Raises RefusedError for one that is too long or sent too slowly."""
    pieces, size = [], 0
    try:
        async with asyncio.timeout(limits.stalled_seconds):
            async for piece in http.stream():
                size += len(piece)
                if size <= limits.max_body:
                    permits.hold_bytes(len(piece))
                    pieces.append(piece)
                elif size > _UNREAD_BODIES * limits.max_body:
                    break
                else:  # a client reads no response before it has sent its call
                    pieces.clear()
                    permits.drop_bytes()
    except TimeoutError:
        problem = f"the body was not sent within {limits.stalled_seconds:g} seconds"
        raise RefusedError(408, "timeout_error", problem) from None
    if size > limits.max_body:
        raise RefusedError(413, "invalid_request_error", f"the body is longer than {limits.max_body} bytes")
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
