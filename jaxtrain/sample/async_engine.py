"""`AsyncEngine`: the engine for coroutines, such as those of an HTTP server."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

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
        told: dict[int, _Tell] = {}
        try:
            while True:
                while not self._engine.busy or not self._inbox.empty():
                    item = self._inbox.get()
                    if item is None:
                        return
                    request, tell = item
                    if request is None:
                        left = [number for number, each in told.items() if each is tell]
                        self._engine.cancel(left)
                        told = {number: each for number, each in told.items() if each is not tell}
                    else:
                        try:
                            told[self._engine.submit(request)] = tell
                        except (MemoryError, jax.errors.JaxRuntimeError):
                            raise
                        except Exception as error:  # nothing of it was admitted, so the others can go on
                            tell(error)
                for chunk in self._engine.step():
                    told[chunk.request](chunk)
        except Exception as error:
            self._failure = error
        finally:
            self._engine.cancel(list(told))
            self._stopped = True
            for tell in self._listeners.copy():
                tell(None)
            if self._failure is not None and self._on_failure is not None:
                self._on_failure(self._failure)
