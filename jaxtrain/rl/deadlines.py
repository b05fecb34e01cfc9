"""Concurrent calls of user code with a time limit, and the event loop for its coroutines."""

import asyncio
import inspect
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from jaxtrain.train.preemption import Interrupted

T = TypeVar("T")

_CONCURRENT_CALLS = 16
_MAX_TIMEOUTS = 8 * _CONCURRENT_CALLS  # after this many, the remaining calls are not started
_LOOP_SECONDS = 1.0  # an event loop that does not respond for this long is blocked by a coroutine
_POLL_SECONDS = 0.2  # interval at which a wait checks whether it is interrupted

_CALL = threading.local()  # its `deadline`: of the call that runs in this thread


def time_left() -> float:
    """Seconds until the call of `call_all` that runs in this thread is abandoned; infinite outside of one."""
    return max(getattr(_CALL, "deadline", math.inf) - time.monotonic(), 0.0)


def error_text(error: BaseException) -> str:
    """The message of a user's exception as valid Unicode, even if its `__str__` raises."""
    try:
        return str(error).encode(errors="backslashreplace").decode()
    except Exception as inner:  # the boundary to user code, which may raise anything
        return f"(its message cannot be read: {type(inner).__name__})"


def call_all(
    calls: Sequence[Callable[[], T]], seconds: float, interrupted: threading.Event | None = None
) -> list[T | BaseException]:
    """Run the calls; return their results or exceptions, a TimeoutError for a call that exceeds `seconds`.

    Each call runs in a separate daemon thread. A call that exceeds the limit is abandoned, since a thread cannot be
    stopped. However many calls hang, they delay the others by at most about ten times `seconds`, because after
    `_MAX_TIMEOUTS` timeouts the remaining calls are not started.

    Raises Interrupted shortly after `interrupted` is set.
    """
    results: dict[int, T | BaseException] = {}
    finished: SimpleQueue[tuple[int, T | BaseException]] = SimpleQueue()

    def run(index: int, deadline: float) -> None:
        _CALL.deadline = deadline
        try:
            finished.put((index, calls[index]()))
        except BaseException as error:  # the boundary to user code, which may raise anything
            finished.put((index, error))

    waiting, deadlines, timeouts = deque(range(len(calls))), dict[int, float](), 0
    while waiting or deadlines:
        if interrupted is not None and interrupted.is_set():
            raise Interrupted
        while waiting and len(deadlines) < _CONCURRENT_CALLS:
            index = waiting.popleft()
            if timeouts > _MAX_TIMEOUTS:
                results[index] = TimeoutError("not started: too many other calls exceeded the limit")
                continue
            deadlines[index] = time.monotonic() + seconds
            threading.Thread(target=run, args=(index, deadlines[index]), daemon=True).start()
        next_deadline = min(deadlines.values(), default=time.monotonic())
        try:
            index, result = finished.get(timeout=min(max(next_deadline - time.monotonic(), 0), _POLL_SECONDS))
            if deadlines.pop(index, None) is not None:  # else it was abandoned
                results[index] = result
        except Empty:
            for index in [index for index, deadline in deadlines.items() if deadline <= time.monotonic()]:
                del deadlines[index]
                timeouts += 1
                results[index] = TimeoutError(f"took longer than {seconds:g} seconds")
    return [results[index] for index in range(len(calls))]


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
