"""`AsyncEngine`: the engine for coroutines, such as those of an HTTP server."""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial

import jax
import numpy as np

from jaxtrain.sample.engine import Engine
from jaxtrain.sample.prompt_scores import PromptScores
from jaxtrain.sample.requests import Chunk, Request

# Delivers to one stream. An exception fails that stream alone; None means that the engine has stopped.
_Deliver = Callable[[Chunk | Exception | None], None]


class StoppedError(RuntimeError):
    """The engine was closed, or failed with `__cause__`."""


class StreamEndedError(RuntimeError):
    """A stream took too long, or was read too slowly."""


class AsyncEngine:
    """Runs the engine in a thread and serves any number of concurrent coroutines, from any event loop.

        serving = AsyncEngine(engine)
        async for chunk in serving.stream(request): ...

    The engine cannot run requests otherwise until `close`; those of a second `AsyncEngine` are refused. An exception
    caused by one request is raised only in its `stream`; a device error or exhausted memory stops the engine for all. A
    request with many samples does not delay the others: free slots are shared, see `Engine.share_slots`.
    """

    def __init__(self, engine: Engine, on_failure: Callable[[Exception], None] | None = None):
        """`on_failure` is called in the engine's thread with the exception that stopped the engine."""
        self._engine = engine
        engine.share_slots()
        self._on_failure = on_failure
        self._failure: Exception | None = None
        self._stopped = False
        self._listeners: set[_Deliver] = set()
        self._active: dict[int, tuple[_Deliver, int]] = {}  # by the engine's number: its stream, its place in it
        self._inbox: queue.Queue[Callable[[], None] | None] = queue.Queue()  # None closes the engine
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def stopped(self) -> bool:
        """Whether the engine was closed or has failed."""
        return self._stopped

    async def stream(
        self, *requests: Request, seconds: float | None = None, unread: int | None = None
    ) -> AsyncGenerator[Chunk]:
        """Yield the chunks of requests as they are generated; `Chunk.request` is the index in `requests`.

        Leaving the loop early cancels the requests, and so do `seconds` since the call, or more than `unread` chunks
        that the loop has not taken yet.

        Raises ValueError for a request that cannot be served, StreamEndedError for those limits, StoppedError if the
        engine stops before all are done.
        """
        chunks: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def end(problem: str) -> None:
            self._inbox.put(partial(self._cancel, deliver))  # now: the loop may be busy with an earlier chunk for long
            while not chunks.empty():
                chunks.get_nowait()
            chunks.put_nowait(StreamEndedError(problem))

        def put(chunk: Chunk | Exception | None) -> None:
            if unread is not None and chunks.qsize() >= unread and isinstance(chunk, Chunk):
                end(f"{unread} chunks of the stream were not read: its reader is too slow")
            else:
                chunks.put_nowait(chunk)

        def deliver(chunk: Chunk | Exception | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: its coroutine has left and is being cancelled
                loop.call_soon_threadsafe(put, chunk)

        self._listeners.add(deliver)  # before `_stopped` is read, so that a stop in between is not missed
        self._inbox.put(partial(self._submit, requests, deliver))
        timer = None if seconds is None else loop.call_later(seconds, end, f"it took longer than {seconds:g} seconds")
        remaining = sum(request.params.n for request in requests)
        try:
            if self._stopped:
                deliver(None)
            while remaining:
                chunk = await chunks.get()
                if chunk is None:
                    raise self._stopped_error() from self._failure
                if isinstance(chunk, Exception):
                    raise chunk
                remaining -= chunk.completion is not None
                yield chunk
        finally:
            if timer is not None:
                timer.cancel()
            self._listeners.discard(deliver)
            self._inbox.put(partial(self._cancel, deliver))

    async def score_prompt(self, prompt_ids: Sequence[int] | np.ndarray, alternatives: int) -> PromptScores:
        """`Engine.score_prompt`, between two device calls of the engine. Raises as `stream` does."""
        loop = asyncio.get_running_loop()
        scores: asyncio.Queue[PromptScores | Exception | None] = asyncio.Queue()

        def deliver(value: PromptScores | Chunk | Exception | None) -> None:
            assert not isinstance(value, Chunk)
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(scores.put_nowait, value)

        def score() -> None:
            with _failing_alone(deliver):
                deliver(self._engine.score_prompt(prompt_ids, alternatives))

        self._listeners.add(deliver)
        self._inbox.put(score)
        try:
            if self._stopped:
                deliver(None)
            found = await scores.get()
        finally:
            self._listeners.discard(deliver)
        if found is None:
            raise self._stopped_error() from self._failure
        if isinstance(found, Exception):
            raise found
        return found

    def _stopped_error(self) -> StoppedError:
        cause = "" if self._failure is None else f": {type(self._failure).__name__}: {self._failure}"
        return StoppedError(f"the engine has stopped{cause}")

    def close(self) -> None:
        """Cancel all requests and stop the thread."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            with closing(self._engine.run(self._admit)) as chunks:
                for chunk in chunks:
                    deliver, place = self._active[chunk.request]
                    deliver(chunk._replace(request=place))
        except Exception as error:  # whatever it is, every stream gets the error that the engine has stopped
            self._failure = error
        finally:
            self._stopped = True
            for deliver in self._listeners.copy():
                deliver(None)
            if self._failure is not None and self._on_failure is not None:
                self._on_failure(self._failure)

    def _admit(self, idle: bool) -> bool:
        """The source of `Engine.run`: handle all pending inbox items; if the engine is `idle`, wait for one first."""
        while idle or not self._inbox.empty():
            item = self._inbox.get()
            if item is None:
                self._engine.cancel(list(self._active))
                return False
            item()
            idle = not self._engine.busy
        return True

    def _submit(self, requests: Sequence[Request], deliver: _Deliver) -> None:
        with _failing_alone(deliver):
            for place, request in enumerate(requests):
                self._active[self._engine.submit(request)] = deliver, place

    def _cancel(self, deliver: _Deliver) -> None:
        cancelled = [number for number, (each, _) in self._active.items() if each is deliver]
        self._engine.cancel(cancelled)
        for number in cancelled:
            del self._active[number]


@contextmanager
def _failing_alone(deliver: _Deliver) -> Iterator[None]:
    """Exceptions of one request are delivered to it. Those of the device and MemoryError, which affect all, are
    raised."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        deliver(error)
