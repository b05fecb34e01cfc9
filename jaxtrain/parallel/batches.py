"""The rows of the global batch that a host provides, and their placement onto the mesh."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain.parallel.sharding import ROWS, batch_sharding, row_shares
from jaxtrain.types import Batch


def local_rows(mesh: Mesh, rows: int) -> range:
    """The rows of a global batch of `rows` that this host's devices hold. Raises ValueError if not adjacent."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    held = {row for index in indices.values() if index is not None for row in range(*index[0].indices(rows))}
    span = range(min(held), max(held) + 1)
    if len(span) != len(held):
        raise ValueError(
            f"process {jax.process_index()} holds rows {sorted(held)} of the batch, which are not adjacent: "
            "choose mesh.data, mesh.fsdp and mesh.expert so that a host's devices are neighbours"
        )
    return span


def local_shards(mesh: Mesh, rows: int, shards: int) -> range:
    """The virtual shards, each `rows / shards` rows of the batch, that this host reads."""
    held, size = local_rows(mesh, rows), rows // shards
    if held.start % size or held.stop % size:
        raise ValueError(
            f"data.virtual_shards={shards} cuts a batch of {rows} rows into pieces of {size}, but process "
            f"{jax.process_index()} holds rows {held.start} to {held.stop - 1}: choose a multiple of the hosts' number"
        )
    return range(held.start // size, held.stop // size)


def place_batch(batch: Batch, mesh: Mesh, held: range, rows: int) -> Batch:
    """Put this host's rows onto its devices; the result is the global batch.

    The arrays of `batch` are [len(held), ...], rows `held` of a global batch of `rows`; the result's are [rows, ...].
    """
    sharding = batch_sharding(mesh)

    def place(leaf: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            span = range(*index[0].indices(rows))
            return leaf[span.start - held.start : span.stop - held.start]

        return jax.make_array_from_callback((rows, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)


def check_batch_size(rows: int, microbatches: int, mesh: Mesh) -> None:
    """Raise ValueError where the rows of a microbatch cannot be dealt to the devices."""
    shares = row_shares(mesh)
    if rows % (shares * microbatches):
        axes = " x ".join(f"mesh.{axis}" for axis in ROWS)
        nearest = max(round(rows / (shares * microbatches)), 1) * shares * microbatches
        raise ValueError(
            f"train.batch_size={rows} rows cannot be dealt to {axes} = {shares} devices in "
            f"train.microbatches={microbatches}; the nearest batch_size that can is {nearest}"
        )
