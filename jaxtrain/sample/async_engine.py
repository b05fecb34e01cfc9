"""`AsyncEngine`: the engine for coroutines, such as those of an HTTP server."""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import closing, suppress

import jax

from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import Chunk, Request

# Delivers to one stream. An exception fails that request alone; None means that the engine has stopped.
_Deliver = Callable[[Chunk | Exception | None], None]


class StoppedError(RuntimeError):
    """The engine was closed, or failed with `__cause__`."""


class AsyncEngine:
    """Runs the engine in a thread and serves any number of concurrent coroutines, from any event loop.

        serving = AsyncEngine(engine)
        async for chunk in serving.stream(request): ...

    The engine must not be used otherwise until `close`. An exception caused by one request is raised only in its
    `stream`; a device error or exhausted memory stops the engine for all.
    """

    def __init__(self, engine: Engine, on_failure: Callable[[Exception], None] | None = None):
        """`on_failure` is called in the engine's thread with the exception that stopped the engine."""
        self._engine = engine
        self._on_failure = on_failure
        self._failure: Exception | None = None
        self._stopped = False
        self._listeners: set[_Deliver] = set()
        self._active: dict[int, _Deliver] = {}  # by the engine's request number
        # (request, deliver) submits a request, (None, deliver) cancels a stream, None closes the engine.
        self._inbox: queue.Queue[tuple[Request | None, _Deliver] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    async def stream(self, request: Request) -> AsyncGenerator[Chunk]:
        """Yield the chunks of a request as they are generated. Leaving the loop early cancels the request.

        Raises ValueError for a request that cannot be served, StoppedError if the engine stops before it is done.
        """
        chunks: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(chunk: Chunk | Exception | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: its coroutine has left and is being cancelled
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        self._listeners.add(deliver)  # before `_stopped` is read, so that a stop in between is not missed
        self._inbox.put((request, deliver))
        remaining = request.params.n
        try:
            if self._stopped:
                deliver(None)
            while remaining:
                chunk = await chunks.get()
                if chunk is None:
                    cause = "" if self._failure is None else f": {type(self._failure).__name__}: {self._failure}"
                    raise StoppedError(f"the engine has stopped{cause}") from self._failure
                if isinstance(chunk, Exception):
                    raise chunk
                remaining -= chunk.completion is not None
                yield chunk
        finally:
            self._listeners.discard(deliver)
            self._inbox.put((None, deliver))

    def close(self) -> None:
        """Cancel all requests and stop the thread."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            with closing(self._engine.run(self._take)) as chunks:
                for chunk in chunks:
                    self._active[chunk.request](chunk)
        except Exception as error:  # whatever it is, every stream is told that the engine has stopped
            self._failure = error
        finally:
            self._stopped = True
            for deliver in self._listeners.copy():
                deliver(None)
            if self._failure is not None and self._on_failure is not None:
                self._on_failure(self._failure)

    def _take(self, idle: bool) -> bool:
        """The source of `Engine.run`: handle all pending inbox items; if the engine is `idle`, wait for one first."""
        while idle or not self._inbox.empty():
            item = self._inbox.get()
            if item is None:
                self._engine.cancel(list(self._active))
                return False
            request, deliver = item
            if request is not None:
                self._submit(request, deliver)
            else:
                cancelled = [number for number, each in self._active.items() if each is deliver]
                self._engine.cancel(cancelled)
                for number in cancelled:
                    del self._active[number]
            idle = not self._engine.busy
        return True

    def _submit(self, request: Request, deliver: _Deliver) -> None:
        try:
            self._active[self._engine.submit(request)] = deliver
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # the request was not admitted, so the others are unaffected
            deliver(error)
