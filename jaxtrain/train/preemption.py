"""Being asked to stop, by SIGINT, SIGTERM, SIGHUP or SIGUSR1. Imports no JAX: it must be in force before that loads."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

_GRACE_SECONDS = 1.0  # for the main thread to leave by itself during start-up, before the process is ended
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


class Interrupted(BaseException):
    """Work was given up because the process was asked to stop.

    Like KeyboardInterrupt it is no Exception, so that code that handles errors lets it pass. One that leaves the
    `Preemption` context knows the signal.
    """

    signal = 0

    @property
    def exit_code(self) -> int:
        return exit_code(self.signal)

    def __str__(self) -> str:
        return stop_message(self.signal)


class Preemption:
    """Context manager that turns signals into a request to stop, which the training loop looks at.

    - During start-up, until `started` is called, there is nothing to save: the main thread gets an `Interrupted`, and
      a process that has not left the context after a second, because it is compiling for example, is ended.
    - After that the request is only noted. `check` raises `Interrupted` in code that may be given up, and functions
      registered by `on_request` are called at once, from another thread, to wake up what waits.
    - A SIGINT that follows another signal ends the process at once.

    SIGHUP stays ignored where it is ignored already, as under nohup. Must be entered from the main thread, as
    `signal.signal` demands. Entering it again inside itself does nothing.
    """

    def __init__(self) -> None:
        self._requested = 0
        self._starting = True
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._depth = 0

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self._install()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if isinstance(error, Interrupted):
            error.signal = self._requested
        self._depth -= 1
        if self._depth == 0:
            self._restore()

    @property
    def requested(self) -> int:
        """The first signal that this process got; 0 for none."""
        return self._requested

    def started(self) -> None:
        """Say that a step is done: from now on there is something to save."""
        self._starting = False

    def check(self) -> None:
        """Raise `Interrupted` where this process was asked to stop. From any thread."""
        if self._requested:
            raise Interrupted

    def on_request(self, callback: Callable[[], None]) -> None:
        """Have `callback` called at the first signal, in another thread; it must return soon."""
        with self._lock:
            self._callbacks.append(callback)
            late = self._requested
        if late:
            callback()

    def _install(self) -> None:
        # Python runs a handler only between two operations of the main thread. A thread that reads the numbers as they
        # come also acts while the main thread is in a compiler or waits for a device.
        wake, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._before = {
            number: signal.signal(number, self._handle)
            for number in SIGNALS
            if not (number == signal.SIGHUP and ignored)
        }
        self._wake_before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._unraisable_before, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._watcher = threading.Thread(target=self._watch, args=(wake,), name="signals", daemon=True)
        self._watcher.start()

    def _restore(self) -> None:
        signal.set_wakeup_fd(self._wake_before)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        sys.unraisablehook = self._unraisable_before
        os.write(self._wake, b"\0")
        self._watcher.join()
        os.close(self._wake)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = self._requested or number
        if self._starting:
            raise Interrupted

    def _unraisable(self, dropped: sys.UnraisableHookArgs) -> None:
        # Python drops what is raised in a finaliser or a callback of the garbage collector, and prints a traceback. An
        # `Interrupted` dropped there is no error: the watcher ends the process a second later.
        if not issubclass(dropped.exc_type, Interrupted):
            self._unraisable_before(dropped)

    def _watch(self, wake: int) -> None:
        first, deadline = 0, None
        while True:
            wait = None if deadline is None else max(deadline - time.monotonic(), 0)
            ready, _, _ = select.select([wake], [], [], wait)
            if not ready:
                deadline = None
                if self._starting:
                    _end_process(first, stop_message(first))
                continue
            for number in os.read(wake, 64):
                if number == 0:
                    os.close(wake)
                    return
                if number not in SIGNALS:
                    continue  # another part of the process has a handler for it
                if first and number == signal.SIGINT:
                    _end_process(number, "SIGINT: stopped at once, without saving")
                if not first:
                    first = number
                    if self._starting:
                        deadline = time.monotonic() + _GRACE_SECONDS
                    self._request(number)

    def _request(self, number: int) -> None:
        with self._lock:
            self._requested = self._requested or number
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()


def exit_code(number: int) -> int:
    """What a shell reports of a process that the signal ended: 143 for SIGTERM."""
    return 128 + number


def stop_message(number: int) -> str:
    """What is said of a run that was asked to stop before it had taken a step."""
    name = signal.Signals(number).name if number else "Interrupted"
    return f"{name}: stopped before the first step, with nothing new to save"


def _end_process(number: int, message: str) -> None:
    """End the process from whatever thread, without waiting for the others."""
    if sys.stdout.isatty():
        print(_SHOW_CURSOR, end="", flush=True)
    print(message, file=sys.stderr, flush=True)
    os._exit(exit_code(number))
