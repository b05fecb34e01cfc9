"""Exchanges of small values between the processes of a run.

All processes call these functions together, in the same order and in their main threads: the values travel over one
device of each process, and programs of two threads may start in a different order on each. With a single process
nothing is communicated.
"""

import pickle
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.train.preemption import Interrupted

T = TypeVar("T")


class PeerError(ValueError):
    """Another process of the run had an error, which its own output describes."""


class _Failure(NamedTuple):
    process: int
    interrupted: bool
    error: str


def gather_values(value: T, processes: range | None = None) -> list[T]:
    """The values of all processes, by process index. `value` is any value that can be pickled.

    `processes`: only those of these; default: all of the run.
    """
    if len(processes or range(jax.process_count())) == 1:
        return [value]
    parts = _over_devices(pickle.dumps(value, pickle.HIGHEST_PROTOCOL), processes or range(jax.process_count()))
    return [pickle.loads(part) for part in parts]


def _over_devices(data: bytes, processes: range) -> list[bytes]:
    mine = np.frombuffer(data, np.uint8)
    sizes = _all_gather(np.array([mine.size]), processes)[:, 0]
    width = 1 << int(sizes.max() - 1).bit_length()  # a power of two, since every size compiles a program
    padded = _all_gather(np.pad(mine, (0, width - mine.size)), processes)
    return [row[:size].tobytes() for row, size in zip(padded, sizes, strict=True)]


def _all_gather(mine: np.ndarray, processes: range) -> np.ndarray:
    """[n] of each process -> [processes, n]."""
    mesh = _one_device_each(processes)
    row = jax.device_put(mine[None], mesh.devices[processes.index(jax.process_index())])
    shape, rows = (len(processes), *mine.shape), NamedSharding(mesh, PartitionSpec("process"))
    gathered = _replicated(mesh)(jax.make_array_from_single_device_arrays(shape, rows, [row]))
    return np.asarray(gathered.addressable_data(0))


@lru_cache
def _one_device_each(processes: range) -> Mesh:
    """The first device of each process: one that trains, where others sample."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    return Mesh(np.array([first[process] for process in processes]), ("process",))


@lru_cache
def _replicated(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda rows: rows, out_shardings=NamedSharding(mesh, PartitionSpec()))


def barrier(name: str) -> None:
    """Return once all processes have called this, with the same name."""
    names = gather_values(name)
    assert set(names) == {name}, f"processes are at different barriers: {names}"


def on_all(work: Callable[[], T], processes: range | None = None) -> T:
    """Call `work`, in which no process waits for another, and return once it has returned on all processes.

    If it raises an exception on one process, that process re-raises it; the others raise Interrupted if it was
    Interrupted, else PeerError. `processes`: as in `gather_values`.
    """
    if len(processes or range(jax.process_count())) == 1:
        return work()
    try:
        result = work()
    except BaseException as error:
        failure = _Failure(jax.process_index(), isinstance(error, Interrupted), f"{type(error).__name__}: {error}")
        gather_values(failure, processes)
        raise
    failures = [failure for failure in gather_values(None, processes) if failure is not None]
    for failure in failures:
        if not failure.interrupted:
            raise PeerError(f"process {failure.process} of {jax.process_count()} failed: {failure.error}")
    if failures:
        raise Interrupted
    return result


def from_process_0(make: Callable[[], T]) -> T:
    """The result of `make`, which only process 0 calls. The exceptions are those of `on_all`."""
    result = on_all(lambda: make() if jax.process_index() == 0 else None)
    first = gather_values(result)[0]
    assert first is not None
    return first
