"""Where the wall time of a run goes: steps, and what keeps it from them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

from jaxtrain.observe.compilations import COMPILATIONS, Compilations, is_compiling

Activity = Literal[
    "steps",  # updates, in reinforcement learning also the rollouts
    "compiling",  # whatever else it is for
    "loading",  # from the start of the session to the first step: data, checkpoint, weights
    "evaluating",
    "saving",  # until the step may go on: the files are written in the background
    "waiting",  # for data
    "lost",  # steps that a failure undid, and the time until the run went on
    "other",  # callbacks
]
ACTIVITIES: tuple[Activity, ...] = get_args(Activity)


class WallTime:
    """Seconds of a run by activity. Its main thread is always busy with exactly one; `seconds` is thread-safe.

    The seconds in which the main thread compiled, by `compilations`, count as that activity alone.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, compilations: Compilations = COMPILATIONS
    ) -> None:
        self._clock, self._compilations = clock, compilations
        self._seconds: dict[Activity, float] = dict.fromkeys(ACTIVITIES, 0.0)
        self._lock, self._thread = threading.Lock(), threading.get_ident()
        self.activity: Activity = "loading"
        self._samples = False
        self._since, self._compiled = clock(), compilations.seconds

    def become(self, activity: Activity) -> Activity:
        """The main thread is busy with `activity` from now on. Returns what it was busy with before."""
        with self._lock:
            now, compiled = self._clock(), self._compilations.seconds
            passed = now - self._since
            in_compiler = min(compiled - self._compiled, passed)
            self._seconds["compiling"] += in_compiler
            self._seconds[self.activity] += passed - in_compiler
            self._since, self._compiled = now, compiled
            before, self.activity = self.activity, activity
        return before

    @property
    def current(self) -> str:
        """What the main thread is busy with at the moment: `compiling`, or else `activity`, of which `steps` is
        `sampling` or `training`. Thread-safe.
        """
        if is_compiling(self._thread):
            return "compiling"
        return self.activity if self.activity != "steps" else "sampling" if self._samples else "training"

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Samples are drawn and rewarded, or waited for, within the block; that counts as steps."""
        self._samples = True
        try:
            yield
        finally:
            self._samples = False

    @contextmanager
    def spent(self, activity: Activity) -> Iterator[None]:
        """The main thread is busy with `activity` within the block."""
        before = self.become(activity)
        try:
            yield
        finally:
            self.become(before)

    def during(self, activity: Activity, function: Callable[[], None]) -> Callable[[], None]:
        """`function`, whose calls are spent with `activity`."""

        def timed() -> None:
            with self.spent(activity):
                function()

        return timed

    def seconds(self) -> dict[str, float]:
        """So far, by activity."""
        with self._lock:
            seconds: dict[str, float] = {**self._seconds}
            seconds[self.activity] += self._clock() - self._since
        return seconds

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds of an earlier session of the run, or move some from one activity to another by a negative one."""
        with self._lock:
            for activity in ACTIVITIES:
                self._seconds[activity] += seconds.get(activity, 0.0)

    def metrics(self) -> dict[str, float]:
        """`goodput`, the share of the run's time that was spent in steps, and `time_share/ACTIVITY` of the others."""
        self.become(self.activity)
        return time_shares(self.seconds())


def time_shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """The metrics of `WallTime` from its seconds."""
    total = sum(seconds.values()) or 1.0
    shares = {f"time_share/{name}": value / total for name, value in seconds.items() if name != "steps"}
    return {"goodput": seconds.get("steps", 0.0) / total} | shares
