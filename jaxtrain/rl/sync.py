"""From the trainer's parameters to those that sample: adapters merged, cast, moved to where the engine runs."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jaxtrain.nn.model import Model
from jaxtrain.sample.placement import cast_matrices, serving_shardings
from jaxtrain.types import Params


def rollout_model(model: Model, mesh: Mesh | None) -> Model:
    """The trainer's `model` as it samples: without adapters, on `mesh`."""
    return replace(model, lora=None, new_tokens=None, run=replace(model.run, mesh=mesh))


class Synced(NamedTuple):
    params: Params  # of the rollout model; shares no buffer with the trainer's, which the next step donates
    bytes: int
    seconds: float


@dataclass(frozen=True)
class WeightSync:
    """`sync(params)` for one trainer and one rollout model. From device to device where both are in this process."""

    trainer: Model
    rollout: Model

    def __call__(self, params: Params) -> Synced:
        start = time.perf_counter()
        merged = _merged(self.trainer, params)
        if self.rollout.run.mesh != self.trainer.run.mesh:
            merged = jax.device_put(merged, serving_shardings(self.rollout))
        return _synced(merged, start)


def to_host(trainer: Model, params: Params) -> Synced:
    """The same for another process: numpy arrays, of which those in bfloat16 are seen as uint16.

    Shared memory knows numpy's own dtypes only; what is of another one would be pickled, and copied by every reader.
    """
    start = time.perf_counter()
    host = jax.device_get(_merged(trainer, params))
    return _synced(jax.tree.map(lambda leaf: leaf.view(np.uint16) if leaf.dtype == jnp.bfloat16 else leaf, host), start)


def from_host(rollout: Model, tree: Params) -> Params:
    """`to_host` undone, on this process's devices."""

    def place(leaf: np.ndarray) -> jax.Array:
        return jnp.asarray(leaf.view(ml_dtypes.bfloat16) if leaf.dtype == np.uint16 else leaf)

    params = jax.tree.map(place, tree)
    return params if rollout.run.mesh is None else jax.device_put(params, serving_shardings(rollout))


@partial(jax.jit, static_argnums=0)
def _merged(model: Model, params: Params) -> Params:
    params = model.merged(params)[1]
    # A copy even where nothing is cast: an output that is an input is the same buffer, which the trainer gives away.
    return jax.tree.map(jnp.copy, cast_matrices(params, model.run.dtype))


def _synced(tree: Params, start: float) -> Synced:
    jax.block_until_ready(tree)
    return Synced(tree, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)), time.perf_counter() - start)
