"""Listens on a socket, and serves an application until a signal: slow connections are closed, running calls drain."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from jaxtrain.serve.app import make_app
from jaxtrain.serve.limits import ABORT, Limits
from jaxtrain.serve.served import Served

_PACKAGES = ("starlette", "uvicorn", "prometheus_client")
_RESERVED_FILES = 128  # of the process, apart from connections


def listen(host: str, port: int) -> socket.socket:
    """Open the socket for `serve`, before time is spent on loading a model.

    Raises ValueError if a package is not installed, or if it cannot listen on the address.
    """
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install 'jaxtrain[serve]'")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error


def serve(served: Served, listening: socket.socket, limits: Limits | None = None, api_key: str | None = None) -> None:
    """Answer until interrupted. An exception that ends the engine is raised after all waiting clients got an error,
    so that a supervisor can restart the server."""
    failures: list[Exception] = []

    def stop(failure: Exception) -> None:
        failures.append(failure)
        server.should_exit = True

    limits = limits or Limits()
    server = make_server(make_app(served, stop, limits, api_key), limits)
    with suppress(KeyboardInterrupt):  # which uvicorn raises again once it has shut down
        server.run(sockets=[listening])
    if failures:
        raise failures[0]


def make_server(app: Any, limits: Limits, **options: Any) -> Any:
    """A `uvicorn.Server` for an application; `options` are those of `uvicorn.Config`.

    On SIGTERM or SIGINT it accepts no more connections, and running calls have `limits.drain_seconds` to end.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        http=_connection_class(limits.stalled_seconds),
        log_level="warning",
        limit_concurrency=_maximum_files() - _RESERVED_FILES,
        timeout_graceful_shutdown=limits.drain_seconds,
        **options,
    )
    return uvicorn.Server(config)


def _maximum_files() -> int:
    """Raise the number of files, which includes connections, that the process may open to the maximum."""
    try:
        import resource
    except ImportError:  # not on this operating system
        return 2**16
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # "unlimited" is refused on macOS
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**16 if soft == resource.RLIM_INFINITY else soft


def _connection_class(stalled_seconds: float) -> Any:
    """A class of connections which close if for `stalled_seconds` their client neither sends the head of a call nor
    takes anything of a response."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            answer: Callable[..., Any] = self.app

            async def app(scope: Any, receive: Any, send: Any) -> None:
                self._stop_timer()
                scope[ABORT] = transport.abort
                try:
                    await answer(scope, receive, send)
                finally:
                    self._start_timer()

            self.app = app
            self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop_timer()

        def _start_timer(self) -> None:
            unsent = self.transport.get_write_buffer_size()
            self._timer = self.loop.call_later(stalled_seconds, self._check, unsent)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _check(self, unsent: int) -> None:
            """Called between two calls. `unsent` bytes of the last response were in the buffer when the timer began."""
            if self.transport.get_write_buffer_size() < unsent:
                self._start_timer()
            else:
                self.transport.abort()

    return Connection
