"""Sends the trainer's parameters to the sampler: merges adapters, casts, and transfers to the engine's devices."""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxtrain.nn.model import Model
from jaxtrain.sample.capacity import cast_matrices, serving_shardings
from jaxtrain.types import Params


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
