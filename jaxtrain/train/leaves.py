"""The leaves of a saved tree: their names, their descriptions in the record, and the arrays that are stored."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.types import Array


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves in tree order by their dotted names, e.g. `opt_state.0.mu.embed.weight`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    assert len(leaves) == len(paths), "two leaves with the same name"
    return leaves


def describe(leaf: Any) -> list[Any]:
    """Shape and dtype, as JSON values."""
    return [list(leaf.shape), str(leaf.dtype)]


def show(description: list[Any]) -> str:
    """A description for a message, e.g. `float32[8, 512]`."""
    shape, dtype = description
    return f"{dtype}{shape}"


def leaf_mismatches(saved: dict[str, Any], wanted: dict[str, Any], partial: bool = False) -> list[str]:
    """What differs between the leaves `wanted` and the descriptions of those of a checkpoint. With `partial` the
    checkpoint may have others besides."""
    here = {name: describe(leaf) for name, leaf in wanted.items()}
    faults = [f"{name} is missing in the checkpoint" for name in here.keys() - saved.keys()]
    if not partial:
        faults += [f"{name} is only in the checkpoint" for name in saved.keys() - here.keys()]
    faults += [
        f"{name} is {show(saved[name])} in the checkpoint and {show(here[name])} here"
        for name in here.keys() & saved.keys()
        if saved[name] != here[name]
    ]
    return faults


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Array) -> Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def raw_leaves(leaves: dict[str, Array]) -> dict[str, Array]:
    """The arrays that are stored: a typed PRNG key as its uint32 words, other leaves unchanged."""
    return {name: _raw(leaf) for name, leaf in leaves.items()}


def raw_struct(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of the stored array of `leaf`, on the first local device if it has no sharding."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    raw = jax.eval_shape(_raw, leaf)
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def unraw(raw: jax.Array, leaf: Any) -> Array:
    """The leaf whose stored array is `raw`; `leaf` has its dtype."""
    if not _is_key(leaf):
        return raw
    # `key_impl` takes an array, and `leaf` may be a ShapeDtypeStruct.
    return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(jnp.empty((), leaf.dtype)))
