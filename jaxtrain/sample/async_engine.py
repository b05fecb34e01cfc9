"""`AsyncEngine`: the engine for coroutines, such as those of an HTTP server."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import closing, suppress

import jax

from jaxtrain.sample.engine import Engine
from jaxtrain.sample.requests import Chunk, Request

_Tell = Callable[[Chunk | Exception | None], None]  # an exception costs its request alone; None: the engine has stopped


class StoppedError(RuntimeError):
    """The engine was closed, or its `__cause__` ended it."""


class AsyncEngine:
    """The engine in a thread of its own, which serves any number of coroutines, of any event loop, at a time.

        serving = AsyncEngine(engine)
        async for chunk in serving.stream(request): ...

    Nobody else may use the engine until `close`. An exception that comes of one request is raised in its `stream`
    alone; one of the device, or memory that runs out, ends the engine for all.
    """

    def __init__(self, engine: Engine, on_failure: Callable[[Exception], None] | None = None):
        """`on_failure` is told, in the engine's thread, what ended it."""
        self._engine = engine
        self._on_failure = on_failure
        self._failure: Exception | None = None
        self._stopped = False
        self._listeners: set[_Tell] = set()
        self._told: dict[int, _Tell] = {}  # of the requests under way, by the engine's numbers
        # Requests to begin, each with whom to tell of it; without a request, whom not to tell any more.
        self._inbox: queue.Queue[tuple[Request | None, _Tell] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    async def stream(self, request: Request) -> AsyncGenerator[Chunk]:
        """The chunks of a request, as they come. To leave early cancels it.

        Raises ValueError for one that cannot be served, StoppedError where the engine stops before it is done.
        """
        self._engine.check([request])
        arrived: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
        here = asyncio.get_running_loop()

        def tell(chunk: Chunk | Exception | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: its coroutine has left, and its cancelling is under way
                here.call_soon_threadsafe(arrived.put_nowait, chunk)

        self._listeners.add(tell)  # before the question whether it has stopped: who is listed then is told so
        self._inbox.put((request, tell))
        running = request.params.n
        try:
            if self._stopped:
                tell(None)
            while running:
                chunk = await arrived.get()
                if chunk is None:
                    why = "" if self._failure is None else f": {type(self._failure).__name__}: {self._failure}"
                    raise StoppedError(f"the engine has stopped{why}") from self._failure
                if isinstance(chunk, Exception):
                    raise chunk
                running -= chunk.completion is not None
                yield chunk
        finally:
            self._listeners.discard(tell)
            self._inbox.put((None, tell))

    def close(self) -> None:
        """Stop, whatever is under way."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            with closing(self._engine.run(self._take)) as chunks:
                for chunk in chunks:
                    self._told[chunk.request](chunk)
        except Exception as error:
            self._failure = error
        finally:
            self._stopped = True
            for tell in self._listeners.copy():
                tell(None)
            if self._failure is not None and self._on_failure is not None:
                self._on_failure(self._failure)

    def _take(self, idle: bool) -> bool:
        """The source of `Engine.run`: what has come since the last device call, or what comes first if `idle`."""
        while idle or not self._inbox.empty():
            item = self._inbox.get()
            if item is None:
                self._engine.cancel(list(self._told))
                return False
            request, tell = item
            if request is not None:
                self._submit(request, tell)
            else:
                left = [number for number, each in self._told.items() if each is tell]
                self._engine.cancel(left)
                for number in left:
                    del self._told[number]
            idle = not self._engine.busy
        return True

    def _submit(self, request: Request, tell: _Tell) -> None:
        try:
            self._told[self._engine.submit(request)] = tell
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # nothing of it was admitted, so the others can go on
            tell(error)
