"""The processes of a run as one job: an error, a signal or a step that does not come back ends all of them."""

from __future__ import annotations

import faulthandler
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import jax

from jaxtrain.config.distributed import DistributedSection
from jaxtrain.parallel.distributed import initialize_distributed
from jaxtrain.parallel.peers import end_process
from jaxtrain.train.agree import PeerError
from jaxtrain.train.preemption import Interrupted, Preemption, error_code, exit_code, stop_message
from jaxtrain.train.watchdog import Watchdog

TIMED_OUT = 124
"""The exit code of a run that the watchdog has ended, as of timeout(1)."""

_TICK_SECONDS = 1.0
_BLAMED_WITHIN = 5.0  # seconds within which another process names itself the cause of an error that its end may cause
_OF_RUNTIME = re.compile("(CANCELLED|UNKNOWN|DEADLINE_EXCEEDED|FAILED_PRECONDITION|ABORTED|INTERNAL|UNAVAILABLE): ")


class Job:
    """Context manager of a run, from the moment at which all its processes have joined.

    - An exception that leaves it ends all processes, with the exit code that it has in the `jaxtrain` command.
    - A request to stop that one process received is passed on to the `Preemption` of all.
    - `watchdog` ends the run if a wait is too long.

    With a single process only the watchdog is active.
    """

    def __init__(self, preemption: Preemption, section: DistributedSection) -> None:
        self.preemption = preemption
        self.watchdog = Watchdog(section.step_timeout)
        self._peers = initialize_distributed(section)
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if (peers := self._peers) is not None:
            self.preemption.on_request(lambda: peers.stop(self.preemption.requested))
            peers.arrive(self.preemption.receive)
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        self._watcher.join()
        if error is not None and not (isinstance(error, SystemExit) and not error.code):
            self._report(error)
        elif self._peers is not None:
            self._peers.leave()

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Reports an exception to the other processes before contexts that are left later."""
        try:
            yield
        except (Exception, Interrupted) as error:
            self._report(error)
            raise

    def _report(self, error: BaseException) -> None:
        peers = self._peers
        if peers is None:
            return
        if _may_be_of_another(error) and peers.failed.wait(_BLAMED_WITHIN):
            threading.Event().wait()  # until `peers` ends the process: this error does not name the cause
        if isinstance(error, Interrupted):
            number = self.preemption.requested
            peers.error(stop_message(number), exit_code(number))
            return
        code = error_code(error)
        text = str(error) if code == 2 else f"{type(error).__name__}: {error}"
        details = "" if code == 2 else "".join(traceback.format_exception(error))
        peers.error(text, code, details=details)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(_TICK_SECONDS):
            now = time.monotonic()
            passed, last = min(now - last, 2 * _TICK_SECONDS), now
            self.watchdog.tick(passed, self._peers is not None and self._peers.others_busy)
            if self._peers is not None:
                self._peers.busy(self.watchdog.busy())
            if late := self.watchdog.late(stopping=bool(self.preemption.requested)):
                self._end(late)
                return

    def _end(self, late: str) -> None:
        number = self.preemption.requested
        code = exit_code(number) if number else TIMED_OUT
        if self._peers is not None:
            self._peers.error(late, code, stacks=True)
            return
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        end_process(code, f"error: {late} (distributed.step_timeout): the run is ended")


def _may_be_of_another(error: BaseException | None) -> bool:
    """Whether the error may come from the end of another process, as those of collectives and barriers do."""
    while error is not None:
        # Some of the runtime's errors are plain ValueErrors.
        if isinstance(error, (PeerError, jax.errors.JaxRuntimeError)) or _OF_RUNTIME.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
