"""The ASGI middleware around all endpoints: API key, permits, slow clients and metrics."""

import asyncio
import hmac
import time
from typing import Any

from jaxtrain.serve.answers import error_answer
from jaxtrain.serve.limits import ABORT, PERMITS, Admission, Permits, RefusedError
from jaxtrain.serve.metrics import ServerMetrics

_OPEN = ("/health",)  # answered without the API key


class Guard:
    """An ASGI application around `app`: refuses calls without the key, and ends those whose client is too slow.

    The call's `Permits` are in its scope, and are released when its response has ended, normally or not.
    """

    def __init__(self, app: Any, admission: Admission, metrics: ServerMetrics, api_key: str | None):
        self._app, self._admission, self._metrics = app, admission, metrics
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stalled_seconds, start, status = self._admission.limits.stalled_seconds, time.perf_counter(), 0

        async def send_in_time(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            try:
                async with asyncio.timeout(stalled_seconds):
                    await send(message)
            except TimeoutError:
                # The connection cannot be closed normally: the rest of the response would be sent first.
                scope.get(ABORT, lambda: None)()
                raise ClientStalledError from None

        permits = scope[PERMITS] = Permits(self._admission, (scope.get("client") or ("",))[0])
        try:
            if self._allowed(scope):
                await self._app(scope, receive, send_in_time)
            else:
                refusal = RefusedError(401, "authentication_error", "the API key is missing or wrong")
                await refusal_response(refusal)(scope, receive, send_in_time)
        except ClientStalledError:
            status = 0  # the connection is closed
        finally:
            permits.release()
            self._metrics.count(scope["path"], status, time.perf_counter() - start)

    def _allowed(self, scope: Any) -> bool:
        if self._key is None or scope["path"] in _OPEN:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._key)


class ClientStalledError(Exception):
    """A client did not take a part of its response in time."""


def refusal_response(error: RefusedError, param: str | None = None) -> Any:
    """The response to a refused call."""
    from starlette.responses import JSONResponse

    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
    content = error_answer(str(error), error.kind, param).model_dump()
    return JSONResponse(content, status_code=error.status, headers=headers.get(error.status))
