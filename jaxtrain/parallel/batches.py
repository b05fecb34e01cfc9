"""The rows of the global batch that each host provides, and their transfer to the devices."""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain.parallel.sharding import ROWS, batch_sharding, context_shards, row_shares
from jaxtrain.types import Array, Batch

T = TypeVar("T", bound=Any)


def local_rows(mesh: Mesh, rows: int) -> range:
    """The rows of a global batch of `rows` that this host's devices hold.

    Raises ValueError if they are not adjacent.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    held = {row for index in indices.values() if index is not None for row in range(*index[0].indices(rows))}
    span = range(min(held), max(held) + 1)
    if len(span) != len(held):
        raise ValueError(
            f"process {jax.process_index()} holds rows {sorted(held)} of the batch, which are not adjacent: "
            "choose mesh.data, mesh.fsdp and mesh.expert so that the devices of a host hold adjacent rows"
        )
    return span


def local_row_shares(mesh: Mesh | None) -> int:
    """The number of parts that this host's rows of a batch are split into; 1 without a mesh.

    Raises ValueError if several hosts hold the same rows.
    """
    if mesh is None:
        return 1
    shares, processes = row_shares(mesh), jax.process_count()
    if shares % processes:
        if mesh.shape["context"] == mesh.shape["tensor"] == 1:
            raise ValueError(f"the {mesh.size} devices of this mesh do not divide over {processes} processes")
        axes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in ("context", "tensor") if mesh.shape[axis] > 1)
        raise ValueError(
            f"{axes} splits a row over several processes: choose a divisor of the {mesh.size // processes} devices of "
            "a process"
        )
    return len(local_rows(mesh, shares))


def row_processes(mesh: Mesh | None) -> list[int]:
    """The processes that hold the same rows as this one, in order, this one included: the axes that split a row may
    extend over several. All of them read these rows, and the first counts them and saves the state of their data.

    Raises ValueError if another process holds only some of them.
    """
    if mesh is None:
        return [jax.process_index()]
    shares = row_shares(mesh)
    held: dict[int, set[int]] = {}
    for device, index in batch_sharding(mesh).devices_indices_map((shares,)).items():
        held.setdefault(device.process_index, set()).update(range(*index[0].indices(shares)))
    here = held.get(jax.process_index())
    if here is None:  # none of the mesh's devices is of this process
        return [jax.process_index()]
    found = sorted(process for process, rows in held.items() if rows & here)
    if any(held[process] != here for process in found):
        raise ValueError(
            f"processes {', '.join(map(str, found))} hold some rows of the batch in common and others not: choose "
            "mesh.context and mesh.tensor so that a row is on whole processes, or on one"
        )
    return found


def local_shards(mesh: Mesh, rows: int, shards: int) -> range:
    """The virtual shards, each `rows / shards` rows of the batch, that this host reads.

    Raises ValueError if it holds a part of a shard.
    """
    held, size = local_rows(mesh, rows), rows // shards
    if held.start % size or held.stop % size:
        raise ValueError(
            f"data.virtual_shards={shards} splits a batch of {rows} rows into parts of {size}, but process "
            f"{jax.process_index()} holds rows {held.start} to {held.stop - 1}: choose a multiple of the number of "
            "hosts"
        )
    return range(held.start // size, held.stop // size)


def place_batch(batch: Batch, mesh: Mesh, rows: int | None = None) -> Batch:
    """Put this host's rows onto its devices; the result is the global batch of `rows` (default: of all hosts' rows).

    `batch` holds the rows of `local_rows`, or all of them, depending on `rows`.
    """
    sharding = batch_sharding(mesh)
    if rows is None:
        return jax.make_array_from_process_local_data(sharding, batch)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, leaf, (rows, *leaf.shape[1:])), batch
    )


def host_rows(array: Array) -> np.ndarray:
    """This host's rows of a placed array [B, ...], the inverse of `place_batch`. Waits for the device."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    held = {shard.index[0].indices(len(array))[0]: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(held[start]) for start in sorted(held)])


def move_batch(batch: T, mesh: Mesh) -> T:
    """A placed batch, or an array of it, on the devices of `mesh`. Copies nothing that is there already."""
    return jax.device_put(batch, batch_sharding(mesh))


def check_batch_size(rows: int, microbatches: int, mesh: Mesh) -> None:
    """Raise ValueError if the rows of a microbatch do not divide evenly over the devices."""
    shares = row_shares(mesh)
    if rows % (shares * microbatches):
        axes = " x ".join(f"mesh.{axis}" for axis in ROWS)
        nearest = max(round(rows / (shares * microbatches)), 1) * shares * microbatches
        raise ValueError(
            f"train.batch_size={rows} rows do not divide over {axes} = {shares} devices in "
            f"train.microbatches={microbatches}; the nearest batch_size that does is {nearest}"
        )


def check_row_length(length: int, mesh: Mesh) -> None:
    """Raise ValueError if the tokens of a row do not divide evenly over "context"."""
    parts = context_shards(mesh)
    if length % parts:
        raise ValueError(
            f"rows of {length} tokens do not divide over mesh.context={parts}; the next data.row_length that does is "
            f"{-(-length // parts) * parts}"
        )
