"""The birth of a `TrainState`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxtrain.parallel.sharding import replicated
from jaxtrain.types import Array, Params, TrainState


def new_state(params: Params, tx: optax.GradientTransformation, key: Array) -> TrainState:
    """Step 0. Parameters must already lie where they shall stay; the optimizer's moments lie down beside them.

    Jit it (or `jax.eval_shape` it): optimizer state then takes the shardings that the compiler carries over.
    """
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), key, zero, zero)


def state_shardings(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """Shardings of an abstract state: a moment has its parameter's sharding, and everything else is replicated.

    `state.params` are `ShapeDtypeStruct`s with shardings. An optimizer's leaf belongs to the parameter whose path its
    own path ends with and whose shape it has.
    """
    whole = replicated(mesh)
    params = dict(jax.tree_util.tree_flatten_with_path(state.params)[0])

    def of_moment(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        for start in range(len(path)):
            twin = params.get(path[start:])
            if twin is not None and twin.shape == leaf.shape:
                return twin.sharding
        return whole

    shardings = jax.tree.map(lambda _: whole, state)
    return shardings._replace(
        params=jax.tree.map(lambda leaf: leaf.sharding, state.params),
        opt_state=jax.tree_util.tree_map_with_path(of_moment, state.opt_state),
    )
