"""Concurrent calls of user code with a time limit, and the event loop for its coroutines."""

import asyncio
import inspect
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from jaxtrain.train.preemption import Interrupted

T = TypeVar("T")

_CONCURRENT_CALLS = 16
_MAX_TIMEOUTS = 8 * _CONCURRENT_CALLS  # after this many in a row, the remaining calls are not started
_LOOP_SECONDS = 1.0  # an event loop that does not respond for this long is blocked by a coroutine
POLL_SECONDS = 0.2  # interval at which a wait checks whether it is interrupted

_CALL = threading.local()  # its `deadline`: of the call that runs in this thread


def time_left() -> float:
    """Seconds until the call of `Calls` that runs in this thread is abandoned; infinite outside of one."""
    return max(getattr(_CALL, "deadline", math.inf) - time.monotonic(), 0.0)


def error_text(error: BaseException) -> str:
    """The message of a user's exception as valid Unicode, even if its `__str__` raises."""
    try:
        return str(error).encode(errors="backslashreplace").decode()
    except Exception as inner:  # the boundary to user code, which may raise anything
        return f"(its message cannot be read: {type(inner).__name__})"


class Calls(Generic[T]):
    """Concurrent calls of user code, each in a separate daemon thread, with a limit of `seconds` each.

    A call that exceeds the limit is abandoned with a TimeoutError, since a thread cannot be stopped. However many calls
    hang, they delay the others by at most about ten times `seconds`: after `_MAX_TIMEOUTS` more timeouts than results
    the remaining calls are not started.
    """

    def __init__(self, seconds: float):
        self._seconds, self._timeouts = seconds, 0  # more than results, at least 0
        self._waiting: deque[tuple[int, Callable[[], T]]] = deque()
        self._deadlines: dict[int, float] = {}  # of the running calls
        self._finished: SimpleQueue[tuple[int, float, T | BaseException]] = SimpleQueue()

    def start(self, key: int, call: Callable[[], T]) -> None:
        """Start a call now, or when fewer run. No other call has this `key` until its result was returned."""
        self._waiting.append((key, call))
        self._start_waiting()

    @property
    def pending(self) -> bool:
        """Whether there are calls whose results were not returned yet."""
        return bool(self._waiting or self._deadlines)

    def results(self, wait: float) -> list[tuple[int, T | BaseException]]:
        """The results or exceptions that have come, by key; waits at most `wait` seconds for the first one."""
        found: list[tuple[int, T | BaseException]] = []
        until = time.monotonic() + wait
        while not found and self.pending:
            self._collect(found, min([until, *self._deadlines.values()]))
            self._start_waiting()
            if self._timeouts > _MAX_TIMEOUTS:
                problem = "not started: too many other calls exceeded the limit"
                found += [(key, TimeoutError(problem)) for key, _ in self._waiting]
                self._waiting.clear()
            if time.monotonic() >= until:
                break
        return found

    def _collect(self, found: list[tuple[int, T | BaseException]], until: float) -> None:
        """Append what has finished, waiting for it until a time, and what exceeds its limit."""
        with suppress(Empty):
            wait = max(until - time.monotonic(), 0)
            while True:
                key, at, result = self._finished.get(timeout=wait)
                wait = 0
                if self._deadlines.get(key, -math.inf) >= at:  # else it is late, or was abandoned
                    del self._deadlines[key]
                    self._timeouts = max(self._timeouts - 1, 0)
                    found.append((key, result))
        for key in [key for key, deadline in self._deadlines.items() if deadline <= time.monotonic()]:
            del self._deadlines[key]
            self._timeouts += 1
            found.append((key, TimeoutError(f"took longer than {self._seconds:g} seconds")))

    def _start_waiting(self) -> None:
        while self._waiting and len(self._deadlines) < _CONCURRENT_CALLS and self._timeouts <= _MAX_TIMEOUTS:
            key, call = self._waiting.popleft()
            self._deadlines[key] = time.monotonic() + self._seconds
            threading.Thread(target=self._run, args=(key, call, self._deadlines[key]), daemon=True).start()

    def _run(self, key: int, call: Callable[[], T], deadline: float) -> None:
        _CALL.deadline = deadline
        result: T | BaseException
        try:
            result = call()
        except BaseException as error:  # the boundary to user code, which may raise anything
            result = error
        self._finished.put((key, time.monotonic(), result))


def call_all(
    calls: Sequence[Callable[[], T]], seconds: float, interrupted: threading.Event | None = None
) -> list[T | BaseException]:
    """The results or exceptions of `Calls`, in order. Raises Interrupted shortly after `interrupted` is set."""
    running = Calls[T](seconds)
    for key, call in enumerate(calls):
        running.start(key, call)
    results: dict[int, T | BaseException] = {}
    while running.pending:
        if interrupted is not None and interrupted.is_set():
            raise Interrupted
        results |= dict(running.results(POLL_SECONDS))
    return [results[key] for key in range(len(calls))]


def awaited(value: Any) -> Any:
    """`value`, or its result if it is awaitable.

    All awaitables run on one event loop in a separate thread, so that a client that was opened in one call can be used
    in the next. Must not be called from that loop.
    """
    if not inspect.isawaitable(value):
        return value
    return asyncio.run_coroutine_threadsafe(_await(value), _EVENT_LOOP.get()).result()


async def _await(value: Awaitable[T]) -> T:
    return await value


class _EventLoop:
    """A running event loop, replaced when a coroutine blocks it (by calling `time.sleep`, for example)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None or not _responds(self._loop):
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="user-coroutines", daemon=True).start()
            return self._loop


_EVENT_LOOP = _EventLoop()


def _responds(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(_LOOP_SECONDS)
    except TimeoutError:
        return False
    return True
