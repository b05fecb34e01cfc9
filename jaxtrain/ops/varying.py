"""The type of arrays inside `jax.shard_map`: the mesh axes along which they differ between devices."""

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import jax
from jax import Array, lax
from jax.sharding import PartitionSpec

T = TypeVar("T")  # the type of an array


def varying_over(x: T, axes: Collection[str]) -> T:
    """Mark `x` as differing along `axes`: the transpose sums its gradient over them."""
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def varying_as(x: T, like: Any) -> T:
    """Mark `x` as differing along the axes along which `like` does; outside a `shard_map`, `x` itself."""
    return varying_over(x, sorted(jax.typeof(like).manual_axis_type.varying))


def untyped(kernel: Callable[..., Array], *args: Array) -> Array:
    """`kernel(*args)`, for kernels that do not say along which axes their results differ; typed like the first one.

    Inside a `shard_map` such a kernel is an error unless it runs in a nested one that does not check the types.
    """
    if not jax.typeof(args[0]).manual_axis_type.varying:
        return kernel(*args)
    replicated = PartitionSpec()
    nested = jax.shard_map(kernel, in_specs=replicated, out_specs=replicated, axis_names=set(), check_vma=False)
    return varying_as(nested(*args), args[0])
