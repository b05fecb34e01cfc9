"""Calls to foreign code, several at a time, none of which can hold the run for longer than its limit."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

from jaxtrain.train.preemption import Interrupted

T = TypeVar("T")

_AT_ONCE = 16
_LOOK_SECONDS = 0.2  # how often a wait looks whether it is interrupted


def call_all(
    calls: Sequence[Callable[[], T]], seconds: float, interrupted: threading.Event | None = None
) -> list[T | BaseException]:
    """What each call returns, or what it raises; a TimeoutError for one that takes longer than `seconds`.

    A call runs in a thread of its own. One that is late is given up and its thread left to itself, since a thread
    cannot be ended; it does not keep the process alive. All together take at most about ten times `seconds` longer than
    the calls that return, however many hang: past that, the others are not tried.

    Raises Interrupted soon after `interrupted` is set.
    """
    answers: dict[int, T | BaseException] = {}
    done: SimpleQueue[tuple[int, T | BaseException]] = SimpleQueue()

    def run(index: int) -> None:
        try:
            done.put((index, calls[index]()))
        except BaseException as error:  # the boundary to foreign code, which may raise anything
            done.put((index, error))

    waiting, deadlines, hung = deque(range(len(calls))), dict[int, float](), 0
    while waiting or deadlines:
        if interrupted is not None and interrupted.is_set():
            raise Interrupted
        while waiting and len(deadlines) < _AT_ONCE:
            index = waiting.popleft()
            if hung > 8 * _AT_ONCE:
                answers[index] = TimeoutError("not tried: too many others hung")
                continue
            deadlines[index] = time.monotonic() + seconds
            threading.Thread(target=run, args=(index,), daemon=True).start()
        soonest = min(deadlines.values(), default=time.monotonic())
        try:
            index, answer = done.get(timeout=min(max(soonest - time.monotonic(), 0), _LOOK_SECONDS))
            if deadlines.pop(index, None) is not None:  # else it was given up
                answers[index] = answer
        except Empty:
            for index in [index for index, deadline in deadlines.items() if deadline <= time.monotonic()]:
                del deadlines[index]
                hung += 1
                answers[index] = TimeoutError(f"took longer than {seconds:g} seconds")
    return [answers[index] for index in range(len(calls))]
