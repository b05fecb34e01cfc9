"""Sharding and memory of the engine's parameters and cache."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.nn.cache import LayerState
from jaxtrain.nn.model import Model
from jaxtrain.ops.quantize import dense
from jaxtrain.parallel.sharding import RULES, constrain_rows, param_specs, row_shares, with_shardings
from jaxtrain.sample.decode import cache_shardings
from jaxtrain.types import Array, Params, get_leaf

MARK = np.dtype("uint16")  # see `constraints`
_MATRICES = ("kernel", "weight", "lora_a", "lora_b")


def slot_bytes(model: Model, length: int) -> int:
    """Bytes of one slot of `length` tokens on its device: the states of the layers, and marks."""
    slots = row_shares(model.run.mesh)  # as many as are on as many devices
    layers = jax.eval_shape(lambda: model.empty_cache(slots, length).layers)
    shardings = cache_shardings(model, layers)
    if shardings is not None:
        layers = with_shardings(layers, shardings)
    leaves = jax.tree.leaves(layers)
    shapes = [leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    sizes = (math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=True))
    return sum(sizes) + _mark_bytes(model)


def _mark_bytes(model: Model) -> int:
    return MARK.itemsize * model.config.vocab_size


def slots_that_fit(model: Model, length: int, budget: int) -> int:
    """How many slots of `length` tokens fit into `budget` bytes on each device, with the extra copy of a layer that
    growing the cache needs.

    Raises ValueError if no slot fits.
    """
    each = slot_bytes(model, length)
    each += -(-(each - _mark_bytes(model)) // model.config.num_layers)
    slots = budget // each * row_shares(model.run.mesh)
    if not slots:
        raise ValueError(
            f"a cache of {budget / 2**20:.1f} MiB per device is too small: a sample of {length} tokens takes "
            f"{each / 2**20:.1f} MiB; use a larger cache or a smaller max_length"
        )
    return slots


@partial(jax.jit, static_argnums=(0, 1, 2))
def empty_buffers(model: Model, slots: int, length: int) -> tuple[tuple[LayerState, ...], Array]:
    """Every layer's buffers for `slots` rows of up to `length` tokens, and marks [slots, V] uint16.

    Each device allocates only its own shard.
    """
    layers = model.empty_cache(slots, length).layers
    shardings = cache_shardings(model, layers)
    if shardings is not None:
        layers = jax.lax.with_sharding_constraint(layers, shardings)
    return layers, constrain_rows(jnp.zeros((slots, model.config.vocab_size), MARK), model.run.mesh)


def place_params(model: Model, params: Params) -> Params:
    """The engine's copy: a tree per layer, in the compute dtype, sharded only over "tensor" (experts over "expert").

    A decode step reads every weight, so a weight sharded over "fsdp" would be gathered at every step.
    """
    placed = lay_out(model, params)
    return commit_like(model, placed, placed)


def commit_like(model: Model, params: Params, tree: Any) -> Any:
    """`tree` committed to the device of `params`; on a mesh it is committed already.

    JAX compiles separate programs for committed and uncommitted arguments. Results are committed, so uncommitted
    initial values would cause another compilation after a warm-up.
    """
    if model.run.mesh is not None:
        return tree
    (device,) = jax.tree.leaves(params)[0].devices()
    return jax.device_put(tree, device)


@partial(jax.jit, static_argnums=0)
def lay_out(model: Model, params: Params) -> Params:
    """The program of `place_params`."""
    params = cast_matrices(params, model.run.dtype)
    if model.run.mesh is not None:
        params = jax.lax.with_sharding_constraint(params, serving_shardings(model))
    return model.unstack(params)


def serving_shardings(model: Model) -> Params:
    """The shardings of a sampling model's stacked parameters on its mesh."""
    mesh = model.run.mesh
    assert mesh is not None
    rules = {**RULES["fsdp_tensor"], "embed": None, "latent": None, "expert": "expert"}
    counts = {model.config.heads_of(kind)[0] for kind in model.config.attention_kinds}
    if any(count % mesh.shape["tensor"] for count in counts):
        rules["kv_heads"] = None
    return param_specs(model.axes(), model.abstract(), rules, mesh)


def cast_matrices(params: Params, dtype: np.dtype) -> Params:
    """Matrices cast to the forward pass's dtype; the rest (norms, sinks, routers) unchanged."""
    cast = {}
    for name, node in params.items():
        if isinstance(node, dict):
            cast[name] = node if name == "router" else cast_matrices(node, dtype)
        else:
            cast[name] = dense(get_leaf(params, name), dtype) if name in _MATRICES else node
    return cast
