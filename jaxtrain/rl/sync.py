"""Sends the trainer's parameters to the sampler: merges adapters, casts, and transfers to the engine's devices."""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain.nn.model import Model
from jaxtrain.sample.capacity import cast_matrices, serving_shardings
from jaxtrain.types import Params

_PIECE_BYTES = 1 << 28  # of a parameter, gathered from all processes at a time


def rollout_model(model: Model, mesh: Mesh | None) -> Model:
    """The sampler's version of the trainer's `model`: without adapters, on `mesh`."""
    return replace(model, lora=None, new_tokens=None, run=replace(model.run, mesh=mesh))


class Synced(NamedTuple):
    params: Params  # of the rollout model; they share no buffer with the trainer's, which the next step donates
    bytes: int
    seconds: float


@dataclass(frozen=True)
class WeightSync:
    """Callable: converts the trainer's parameters to those of a rollout model in this process, device to device.

    With several processes all call it together, and every engine gets a copy.
    """

    trainer: Model
    rollout: Model
    # With several engines, meshes of the trainer's devices, one for each engine: those of the engines, or those of the
    # same processes. Each gets a copy of the parameters.
    copies: tuple[Mesh, ...] = ()

    def __call__(self, params: Params) -> Synced:
        start = time.perf_counter()
        merged = merge(self.trainer, params)
        mesh = self.trainer.run.mesh
        if self.copies:
            mesh = next(mesh for mesh in self.copies if mesh.local_devices)
            merged = _copied(merged, rollout_model(self.rollout, mesh), self.copies)
        if self.rollout.run.mesh != mesh:
            merged = jax.device_put(merged, serving_shardings(self.rollout))
        return _synced(merged, start)


def to_host(trainer: Model, params: Params) -> Synced:
    """`WeightSync` for a sampler in another process: numpy arrays; those in bfloat16 are viewed as uint16.

    Ray's shared memory supports only numpy's dtypes; others would be pickled, and copied by every reader. Several
    processes, which hold only shards, call it together, and each gets all.
    """
    start = time.perf_counter()
    host = jax.tree.map(_whole, merge(trainer, params))
    return _synced(jax.tree.map(lambda leaf: leaf.view(np.uint16) if leaf.dtype == jnp.bfloat16 else leaf, host), start)


def _whole(leaf: jax.Array) -> np.ndarray:
    """`leaf` on the host. What other processes hold is gathered by pieces, so that a device holds one at a time."""
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    whole = np.empty(leaf.shape, leaf.dtype)
    rows = max(_PIECE_BYTES * len(leaf) // leaf.nbytes, 1)
    for start in range(0, len(leaf), rows):
        start = min(start, max(len(leaf) - rows, 0))  # pieces of one size need one program
        piece = _replicated(leaf, start, min(rows, len(leaf)), leaf.sharding)
        whole[start : start + rows] = piece.addressable_data(0)
    return whole


@partial(jax.jit, static_argnums=(2, 3))
def _replicated(leaf: jax.Array, start: int, rows: int, sharding: NamedSharding) -> jax.Array:
    """Rows of `leaf`, whose sharding is `sharding`, on every device."""
    piece = jax.lax.dynamic_slice_in_dim(leaf, start, rows)
    return jax.lax.with_sharding_constraint(piece, NamedSharding(sharding.mesh, PartitionSpec()))


def from_host(rollout: Model, tree: Params) -> Params:
    """The inverse of `to_host`, on this process's devices."""

    def place(leaf: np.ndarray) -> jax.Array:
        return jnp.asarray(leaf.view(ml_dtypes.bfloat16) if leaf.dtype == np.uint16 else leaf)

    params = jax.tree.map(place, tree)
    return params if rollout.run.mesh is None else jax.device_put(params, serving_shardings(rollout))


def _copied(params: Params, rollout: Model, copies: tuple[Mesh, ...]) -> Params:
    """The parameters on the mesh of `rollout`, which is the one of `copies` with this process's devices.

    The trainer's devices are arranged as (copy, axes of its mesh), over which one program replicates the parameters to
    every copy. A copy's arrays are then made of its shards without another copy.
    """
    arranged = Mesh(
        np.stack([mesh.devices for mesh in copies]),
        ("copy", *copies[0].axis_names),
        axis_types=(AxisType.Auto,) * (1 + len(copies[0].axis_names)),
    )
    own = serving_shardings(rollout)
    placed = jax.device_put(params, jax.tree.map(lambda leaf: NamedSharding(arranged, leaf.spec), own))

    def of_copy(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)

    return jax.tree.map(of_copy, placed, own)


@partial(jax.jit, static_argnums=0)
def merge(model: Model, params: Params) -> Params:
    """The parameters of `model` without adapters, matrices in the compute dtype; a copy."""
    params = model.merged(params)[1]
    # Copy even if nothing is cast: else an output may share its buffer with the input, which the trainer donates.
    return jax.tree.map(jnp.copy, cast_matrices(params, model.run.dtype))


def _synced(tree: Params, start: float) -> Synced:
    jax.block_until_ready(tree)
    return Synced(tree, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)), time.perf_counter() - start)
