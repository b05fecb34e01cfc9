"""Finds processes that hold up the others of a run: those that are busy while the others wait for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import mean, median
from typing import NamedTuple

log = logging.getLogger(__name__)

_FACTOR = 2.0  # of the median of the others
_SHARE = 0.2  # of the time of a step, by which it must be slower
_WINDOWS = 2  # in a row


class HostTimes(NamedTuple):
    """Seconds per step of one process in the last window, without the time that it waited for steps of the devices."""

    host: str
    own: float  # in which it was busy itself, waiting for data included
    data: float  # of these, waiting for data
    step: float  # of the whole step


class Stragglers:
    """Names slow processes in the log, when they become slow."""

    def __init__(self) -> None:
        self._slow: dict[int, int] = {}  # process -> windows in a row

    def update(self, times: Sequence[HostTimes]) -> list[int]:
        """Take the times of all processes, by process; return the slow ones. All are given the same."""
        for process, time in enumerate(times):
            usual = median(other.own for number, other in enumerate(times) if number != process)
            if not (time.own > _FACTOR * usual and time.own - usual > _SHARE * time.step):
                self._slow.pop(process, None)
                continue
            self._slow[process] = self._slow.get(process, 0) + 1
            if self._slow[process] == _WINDOWS:
                log.warning(
                    "process %d on %s holds up the others: of a step of %.3g s it is busy for %.3g s itself (waiting "
                    "for data: %.3g s), the others for %.3g s",
                    *(process, time.host, time.step, time.own, time.data, usual),
                )
        return sorted(process for process, windows in self._slow.items() if windows >= _WINDOWS)


def host_time_metrics(times: Sequence[HostTimes]) -> dict[str, float]:
    """`host_time/*`: seconds per step in which the processes are busy themselves, and the process that is most."""
    own = [time.own for time in times]
    return {
        "host_time/mean": mean(own),
        "host_time/max": max(own),
        "host_time/slowest_process": float(own.index(max(own))),
    }
