"""Exchanges of small values between the processes of a run.

All processes call these functions together, in the same order. The values of the main thread travel over one device of
each process; those of a thread that works beside it, in `beside_training`, through the coordination service, since
programs of two threads may start in a different order on each process. With a single process nothing is communicated.
"""

import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.parallel.distributed import ServiceExchange
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
    exchange = getattr(_of_thread, "exchange", _over_devices)
    return [pickle.loads(data) for data in exchange(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))]


@contextmanager
def beside_training(stopped: Callable[[], bool]) -> Iterator[None]:
    """Let this thread exchange values with the same thread of the other processes, without devices.

    An exchange raises Interrupted once `stopped` returns True, since the others may not take part any more. All
    processes enter such contexts in the same order.
    """
    exchange = ServiceExchange(f"thread{next(_threads)}")

    def gather(data: bytes) -> list[bytes]:
        parts = exchange(data, stopped)
        if parts is None:
            raise Interrupted
        return parts

    _of_thread.exchange = gather
    try:
        yield
    finally:
        del _of_thread.exchange


_of_thread = threading.local()
_threads = itertools.count()


def _over_devices(data: bytes) -> list[bytes]:
    mine = np.frombuffer(data, np.uint8)
    sizes = _all_gather(np.array([mine.size]))[:, 0]
    width = 1 << int(sizes.max() - 1).bit_length()  # a power of two, since every size compiles a program
    padded = _all_gather(np.pad(mine, (0, width - mine.size)))
    return [row[:size].tobytes() for row, size in zip(padded, sizes, strict=True)]


def _all_gather(mine: np.ndarray) -> np.ndarray:
    """[n] of each process -> [processes, n]."""
    mesh = _one_device_each()
    row = jax.device_put(mine[None], mesh.devices[jax.process_index()])
    shape, rows = (jax.process_count(), *mine.shape), NamedSharding(mesh, PartitionSpec("process"))
    gathered = _replicated(mesh)(jax.make_array_from_single_device_arrays(shape, rows, [row]))
    return np.asarray(gathered.addressable_data(0))


@lru_cache
def _one_device_each() -> Mesh:
    """The first device of each process: one that trains, where others sample."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    return Mesh(np.array([first[process] for process in sorted(first)]), ("process",))


@lru_cache
def _replicated(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda rows: rows, out_shardings=NamedSharding(mesh, PartitionSpec()))


def barrier(name: str) -> None:
    """Return once all processes have called this, with the same name."""
    names = gather_values(name)
    assert set(names) == {name}, f"processes are at different barriers: {names}"


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
