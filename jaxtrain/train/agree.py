"""Exchanges of small values between the processes of a run.

All processes call these functions together, on the main thread and in the same order. With a single process there is no
communication.
"""

import pickle
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.train.preemption import Interrupted

T = TypeVar("T")


class PeerError(ValueError):
    """Another process of the run had an error, which its own output describes."""


class _Failure(NamedTuple):
    interrupted: bool
    error: str


def gather_values(value: T) -> list[T]:
    """The values of all processes, by process index. `value` is any value that can be pickled."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(pickle.dumps(value, pickle.HIGHEST_PROTOCOL), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array(mine.size)))
    width = 1 << int(sizes.max() - 1).bit_length()  # a power of two, since every size compiles a program
    padded = np.asarray(multihost_utils.process_allgather(np.pad(mine, (0, width - mine.size))))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(padded, sizes, strict=True)]


def barrier(name: str) -> None:
    """Return once all processes have called this, with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def on_all(work: Callable[[], T]) -> T:
    """Call `work`, in which no process waits for another, and return once it has returned on all processes.

    If it raises an exception on one process, all processes raise: that one the exception itself, the others Interrupted
    if that was Interrupted, else PeerError.
    """
    if jax.process_count() == 1:
        return work()
    try:
        result = work()
    except BaseException as error:
        gather_values(_Failure(isinstance(error, Interrupted), f"{type(error).__name__}: {error}"))
        raise
    failures = {process: failure for process, failure in enumerate(gather_values(None)) if failure is not None}
    for process, failure in failures.items():
        if not failure.interrupted:
            raise PeerError(f"process {process} of {jax.process_count()} failed: {failure.error}")
    if failures:
        raise Interrupted
    return result


def from_process_0(make: Callable[[], T]) -> T:
    """The result of `make`, which only process 0 calls. The exceptions are those of `on_all`."""
    result = on_all(lambda: make() if jax.process_index() == 0 else None)
    first = gather_values(result)[0]
    assert first is not None
    return first
