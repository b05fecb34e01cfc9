"""`RunMonitor`: what an operator sees of a run: where its time goes, slow processes, heartbeats."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtrain.observe.heartbeat import Heartbeat, read_heartbeats
from jaxtrain.observe.stragglers import HostTimes, Stragglers, host_time_metrics
from jaxtrain.observe.wall_time import WallTime
from jaxtrain.train.agree import gather_values
from jaxtrain.train.preemption import Interrupted
from jaxtrain.train.watchdog import Watchdog


class RunMonitor:
    """Follows one session of a run, from its start. All processes make the same calls, on the main thread."""

    def __init__(self, folder: Path, watchdog: Watchdog):
        self.wall = WallTime()
        self.end = "finished"  # the state of the last heartbeat after a session without an exception
        self._folder, self._watchdog = folder, watchdog
        self._heartbeats = read_heartbeats(folder)  # of the session before
        self._stragglers = Stragglers()
        self._step = self._first = self._of_steps = 0
        self._host, self._started = socket.gethostname(), time.time()
        self._stepped: tuple[int, float] | None = None  # the first step of this session, and when it was dispatched
        self._at = self._started  # when the last one was
        self._times: HostTimes | None = None  # of the last window
        self._window = self._mark()

    def carry_over(self, saved: Mapping[str, float] | None, step: int) -> None:
        """The run goes on from the checkpoint of `step`, in which its wall time up to then was `saved`.

        What an earlier session did after that, and the time since it failed, is lost.
        """
        if saved is None:
            return
        self.wall.add(saved)
        before = next((beat for beat in self._heartbeats if beat["process"] == 0 and "seconds" in beat), None)
        if before is None:
            return
        more = max(sum(before["seconds"].values()) - sum(saved.values()), 0.0)
        if before["state"] in ("finished", "stopped") and before["step"] == step:
            self.wall.add({"saving": more})  # it waited for its last checkpoint
        else:
            self.wall.add({"lost": more + max(self._started - before["time"], 0.0)})

    @contextmanager
    def running(self, step: int, of_steps: int) -> Iterator[None]:
        """Training goes on after `step`. Writes heartbeats until the block ends, whose exception is the last one's."""
        self._step = self._first = step
        self._of_steps = of_steps
        self.wall.become("steps")
        self._window = self._mark()
        heartbeat = Heartbeat(self._folder, jax.process_index(), jax.process_count(), self._facts)
        try:
            yield
        except Interrupted:
            heartbeat.stop("stopped")
            raise
        except BaseException as error:
            heartbeat.stop("failed", error=f"{type(error).__name__}: {error}"[:500])
            raise
        heartbeat.stop(self.end)

    def activity(self) -> str:
        """What the main thread is busy with at the moment, for people. Thread-safe."""
        now = self.wall.current
        return "compiling" if now == "training" and self._stepped is None else now  # the first step is traced

    def stepped(self, step: int) -> None:
        """Step `step` was dispatched."""
        self._step, self._at = step, time.time()
        self._stepped = self._stepped or (step, self._at)

    def metrics(self) -> dict[str, float]:
        """The metrics of the window since the last call, of at least one step; with several processes also theirs."""
        mine = self._times = self._host_times()
        metrics = {}
        if jax.process_count() > 1:
            times = gather_values(mine)
            self._stragglers.update(times)
            metrics = host_time_metrics(times)
            # All processes wait for the one that waits for its data.
            further = (max(each.data for each in times) - mine.data) * (self._step - self._window.step)
            self.wall.add({"waiting": further, "steps": -further})
        self._window = self._mark()
        return self.wall.metrics() | metrics

    def _host_times(self) -> HostTimes:
        before, now = self._window, self._mark()
        steps = max(now.step - before.step, 1)
        data, in_steps = (now.seconds[name] - before.seconds[name] for name in ("waiting", "steps"))
        waited = now.waited - before.waited
        return HostTimes(
            host=self._host,
            own=max(in_steps + data - waited, 0.0) / steps,
            data=data / steps,
            step=(in_steps + data) / steps,
        )

    def _mark(self) -> _Mark:
        return _Mark(self._step, self.wall.seconds(), self._watchdog.waited)

    def _facts(self) -> dict[str, Any]:
        """The heartbeat's contents; called from another thread."""
        first = self._stepped
        rate = None if first is None or self._step == first[0] else (self._at - first[1]) / (self._step - first[0])
        return {
            "step": self._step,
            "of_steps": self._of_steps,
            "first_step": self._first,
            "stepped": self._at,
            "seconds_per_step": rate,
            "activity": self.activity(),
            "seconds": self.wall.seconds(),
            "host_times": None if self._times is None else self._times._asdict(),
        }


class _Mark(NamedTuple):
    step: int
    seconds: dict[str, float]  # by activity
    waited: float  # seconds, for steps
