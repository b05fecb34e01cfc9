"""The initial `TrainState`, its shardings, and the tree of several."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain.parallel.sharding import replicated
from jaxtrain.types import Array, Params, TrainState


def new_state(params: Params, tx: optax.GradientTransformation, key: Array) -> TrainState:
    """The state of step 0. To be jitted with `state_shardings`, so that the optimizer's moments are created sharded."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), key, zero, zero)


def state_shardings(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """Shardings of an abstract state: a moment has the sharding of its parameter; all other leaves are replicated.

    `state.params` are `ShapeDtypeStruct`s with shardings. A leaf of the optimizer's state is a moment of the parameter
    that has the same shape and whose path is the end of the leaf's path.
    """
    default = replicated(mesh)
    params = dict(jax.tree_util.tree_flatten_with_path(state.params)[0])

    def of_moment(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        for start in range(len(path)):
            parameter = params.get(path[start:])
            if parameter is not None and parameter.shape == leaf.shape:
                return parameter.sharding
        return default

    shardings = jax.tree.map(lambda _: default, state)
    return shardings._replace(
        params=jax.tree.map(lambda leaf: leaf.sharding, state.params),
        opt_state=jax.tree_util.tree_map_with_path(of_moment, state.opt_state),
    )


def saved_tree(states: Mapping[str, TrainState]) -> dict[str, Any]:
    """The leaves of a checkpoint: those of the first role without a prefix, as an export expects them, and those of the
    others under their names."""
    first, *others = states
    return {**states[first]._asdict(), **{name: states[name] for name in others}}
