"""Finds a run that waits for a step, or for the data of one, much longer than usual."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

FLOOR_SECONDS = 300.0
"""No wait is too long before."""

_STOPPING_FLOOR_SECONDS = 10.0  # the same, once the run was asked to stop
_USUAL = 10  # times
_LEARNED_FROM = 3  # waits, before which the usual one is not known


class Watchdog:
    """Measures how long the main thread has been waiting.

    The main thread waits within `waits`, and is outside of it for what may take long: compiling, evaluating, saving,
    rollouts, callbacks. Another thread calls `tick`. Time is counted in ticks, so that a process that was suspended has
    not waited meanwhile.

    `limit`: seconds of a wait; default: 10 times the median, and at least `FLOOR_SECONDS`.
    """

    def __init__(self, limit: float | None = None) -> None:
        self._limit = limit
        self.waiting: list[str] | None = None  # what for; a new list for each wait, so that two differ
        self.waited = 0.0  # seconds within `waits` so far
        self._seen, self._seconds = self.waiting, 0.0
        self._past: deque[float] = deque(maxlen=64)

    @contextmanager
    def waits(self, for_what: str) -> Iterator[None]:
        """The main thread waits for a step of the devices, and so for the other processes."""
        self.waiting, start = [for_what], time.perf_counter()
        try:
            yield
        finally:
            self.waiting = None
            self.waited += time.perf_counter() - start

    def tick(self, seconds: float, others_busy: bool = False) -> None:
        """`seconds` have passed. While other processes are busy, one that waits for them is not late."""
        waiting = self.waiting
        if waiting is not self._seen:
            if self._seen is not None:
                self._past.append(self._seconds)
            self._seen, self._seconds = waiting, 0.0
        elif waiting is not None and others_busy:
            self._seconds = 0.0
        else:
            self._seconds += seconds

    def busy(self) -> bool:
        """Whether the main thread has done something else than waiting for so long that others should know."""
        return self._seen is None and self._seconds > min(60.0, self._limit_seconds(FLOOR_SECONDS) / 2)

    def late(self, stopping: bool = False) -> str:
        """What has not come back in time; "" if nothing is late. `stopping`: whether the run was asked to stop."""
        limit = self._limit_seconds(_STOPPING_FLOOR_SECONDS if stopping else FLOOR_SECONDS)
        learning = self._limit is None and len(self._past) < _LEARNED_FROM
        if self._seen is None or self._seconds <= limit or learning:
            return ""
        return f"{self._seen[0]} has not come back within {limit:.0f} seconds"

    def _limit_seconds(self, floor: float) -> float:
        usual = max(floor, _USUAL * median(self._past)) if self._past else floor
        return usual if self._limit is None else min(self._limit, usual)
