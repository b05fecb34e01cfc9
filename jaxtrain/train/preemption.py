"""Requests to stop, by SIGINT, SIGTERM, SIGHUP or SIGUSR1. Does not import JAX, so that it can be active before."""

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

from jaxtrain.parallel.peers import end_process

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

_GRACE_SECONDS = 1.0  # during start-up, until the process is ended if the main thread has not left the context


class Interrupted(BaseException):
    """Work was abandoned because of a request to stop.

    Not a subclass of Exception, like KeyboardInterrupt, so that handlers of errors do not catch it. `signal` is that of
    the request; the `Preemption` context sets it when it exits with this exception, if it was not known.
    """

    def __init__(self, signal: int = 0) -> None:
        super().__init__()
        self.signal = signal

    @property
    def exit_code(self) -> int:
        return exit_code(self.signal)

    def __str__(self) -> str:
        return stop_message(self.signal)


class Preemption:
    """Context manager that turns signals into a request to stop, which the training loop polls.

    - During start-up, until `started` is called, there is nothing to save: `Interrupted` is raised in the main thread
      unless it imports a module, and a process that has not left the context after a second, for example because it
      compiles, is ended.
    - After that the request is only recorded. `check` raises `Interrupted` in code that can be abandoned, and the
      callbacks of `on_request` are called immediately, in another thread, to wake up threads that wait.
    - A SIGINT after another signal ends the process immediately.

    SIGHUP stays ignored if it was ignored before, as under nohup. It handles no signals in another thread than the main
    one, where Ray Train calls the function of a worker: `signal.signal` requires the main thread. It is reentrant.
    """

    def __init__(self) -> None:
        self._requested = 0
        self._starting = True
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._depth = 0

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._install()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if isinstance(error, Interrupted):
            error.signal = error.signal or self._requested
        self._depth -= 1
        if self._depth == 0 and threading.current_thread() is threading.main_thread():
            self._restore()

    @property
    def requested(self) -> int:
        """The first signal that this process received, or another one of its job; 0 for none."""
        return self._requested

    def started(self) -> None:
        """Report that a step is done: from now on there is something to save."""
        self._starting = False

    def check(self) -> None:
        """Raise `Interrupted` if this process received a signal. Can be called from any thread."""
        if self._requested:
            raise Interrupted(self._requested)

    def on_request(self, callback: Callable[[], None]) -> None:
        """Call `callback` at the first signal, in another thread; now, if there was one. It must not block."""
        with self._lock:
            requested = self._requested
            if not requested:
                self._callbacks.append(callback)
        if requested:
            callback()

    def receive(self, number: int) -> None:
        """Another process of the job received the signal `number`. Can be called from any thread.

        A SIGINT that follows is the first one that this process receives, as on a terminal, which sends it to all.
        """
        if self._depth == 0:
            return
        if self._starting:
            os.kill(os.getpid(), number)
        else:
            self._request(number)

    def _install(self) -> None:
        # Python runs signal handlers only between bytecodes of the main thread. A thread that reads the wakeup fd also
        # reacts while the main thread is inside a compiler or waits for a device.
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
        if self._starting and not _is_importing(frame):
            raise Interrupted(self._requested)  # maybe before the body of the context, and so without `__exit__`

    def _unraisable(self, ignored: sys.UnraisableHookArgs) -> None:
        # Python ignores exceptions in finalisers and callbacks of the garbage collector, and prints a traceback, not
        # needed for `Interrupted`: the watcher ends the process a second later.
        if not issubclass(ignored.exc_type, Interrupted):
            self._unraisable_before(ignored)

    def _watch(self, wake: int) -> None:
        first, deadline = 0, None
        while True:
            wait = None if deadline is None else max(deadline - time.monotonic(), 0)
            ready, _, _ = select.select([wake], [], [], wait)
            if not ready:
                deadline = None
                if self._starting:
                    end_process(exit_code(first), stop_message(first))
                continue
            for number in os.read(wake, 64):
                if number == 0:
                    os.close(wake)
                    return
                if number not in SIGNALS:
                    continue  # a signal of another handler
                if first and number == signal.SIGINT:
                    at_once = "SIGINT: stopped at once, without saving"
                    end_process(exit_code(number), stop_message(first) if self._starting else at_once)
                if not first:
                    first = number
                    if self._starting:
                        deadline = time.monotonic() + _GRACE_SECONDS
                    self._request(number)

    def _request(self, number: int) -> None:
        with self._lock:
            self._requested = self._requested or number
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: an exception in the initialization of an extension module, such as jaxlib's,
    crashes the interpreter. The watcher ends the process a second later.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def exit_code(number: int) -> int:
    """The exit code that a shell reports for a process that the signal ended: 143 for SIGTERM."""
    return 128 + number


def error_code(error: BaseException) -> int:
    """The exit code of the `jaxtrain` command after an error: 2 for those that the user can correct, else 1."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 2 if isinstance(error, (ValueError, OSError)) else 1


def stop_message(number: int) -> str:
    """The message of a run that was stopped before its first step."""
    name = signal.Signals(number).name if number else "Interrupted"
    return f"{name}: stopped before the first step, with nothing new to save"
