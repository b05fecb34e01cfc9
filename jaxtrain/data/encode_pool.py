"""Worker processes that encode rows: rendering a chat template holds Python's interpreter lock, so threads share one
core for it.

The main process reads the rows, since it holds the index of the files and their cache; a worker gets rows and returns
examples. Workers do not import jax.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import Any

from jaxtrain.data.columns import Row

# A terminal and Slurm signal every process of a job. The main process stops the run, and needs rows until then.
_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_encode: Callable[[Row], Any]  # of a worker process


class EncodePool:
    """`encode` in worker processes. Safe to call from several threads."""

    def __init__(self, encode: Callable[[Row], Any], processes: int):
        """Raises ValueError for a function that cannot be sent to another process."""
        try:
            pickle.dumps(encode)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"data.processes={processes}: the function that makes examples cannot be sent to another process "
                f"({error}): define it at the top level of a module, or leave data.processes at 0"
            ) from None
        # A fork would copy the locks of jax's threads in whatever state they are.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(processes, context, _start, (encode,))
        # Each starts when it first gets work; importing takes seconds, in which the files are scanned.
        for _ in range(processes):
            self._submit(os.getpid)

    def __call__(self, rows: Sequence[Row]) -> list[Any]:
        """As `encode_rows`."""
        try:
            return self._submit(_encode_rows, rows).result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process that encodes rows has died, perhaps because memory ran out: use fewer data.processes"
            ) from None

    def _submit(self, function: Callable[..., Any], *given: Any) -> Future[Any]:
        """A process that is started for it inherits the blocked signals, so that none ends it before `_start`."""
        resource_tracker.ensure_running()  # which would unblock SIGINT
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        try:
            return self._pool.submit(function, *given)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _start(encode: Callable[[Row], Any]) -> None:
    global _encode
    _encode = encode
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # it was killed, and would leave this process waiting for rows


def _encode_rows(rows: Sequence[Row]) -> list[Any]:
    return encode_rows(_encode, rows)


def encode_rows(encode: Callable[[Row], Any], rows: Sequence[Row]) -> list[Any]:
    """What `encode` makes of each row, or the ValueError that it raises."""
    made = []
    for row in rows:
        try:
            made.append(encode(row))
        except ValueError as error:
            made.append(ValueError(str(error)))  # without its cause, which cannot always be sent to another process
    return made
