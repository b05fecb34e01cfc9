"""Matrix products of groups of rows, each group with a matrix of its own, whatever the sizes of the groups."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.types import Array

_TILE = 64  # rows of one group that meet its matrix at once, on CPU


@jax.custom_vjp
def grouped_matmul(x: Array, kernels: Array, sizes: Array) -> Array:
    """Rows times the matrix of their group. Differentiable once by `x` and `kernels`.

    x [M, I], sorted by group; kernels [G, I, O] in x's dtype; sizes [G] int32, the rows of each group, which may be
    none and may leave rows at the end to nobody -> [M, O], 0 in the rows that are nobody's.
    """
    # Resolved when the program is lowered, so a CPU host compiles for other platforms what they would run.
    return lax.platform_dependent(x, kernels, sizes, cpu=_tiled, default=lax.ragged_dot)


def _forward(x: Array, kernels: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_matmul(x, kernels, sizes), (x, kernels, sizes)


def _backward(saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None]:
    x, kernels, sizes = saved
    d_x = grouped_matmul(g, kernels.swapaxes(1, 2), sizes)
    return d_x, lax.platform_dependent(x, g, sizes, cpu=_tiled_outer, default=_ragged_outer), None


grouped_matmul.defvjp(_forward, _backward)


def _ragged_outer(x: Array, g: Array, sizes: Array) -> Array:
    """x [M, I], g [M, O] -> [G, I, O]: the product x^T g of every group."""
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(x, g, sizes, numbers)


class _Tiles:
    """Groups cut into tiles of `_TILE` rows, the last one of a group reaching into the next group or beyond the end.

    XLA's CPU backend multiplies every row by every group's matrix in `lax.ragged_dot`; a loop over tiles multiplies
    each once, at the cost of half a tile per group.
    """

    def __init__(self, sizes: Array):
        self.ends = jnp.cumsum(sizes)
        self.sizes = sizes
        self.count = -(-sizes // _TILE)
        self.behind = jnp.cumsum(self.count)

    def at(self, i: Array) -> tuple[Array, Array, Array]:
        """Group, first row, and the rows of that group from there on."""
        group = jnp.searchsorted(self.behind, i, side="right", method="compare_all")
        first = (i - (self.behind[group] - self.count[group])) * _TILE
        return group, self.ends[group] - self.sizes[group] + first, self.sizes[group] - first


def _tiled(x: Array, kernels: Array, sizes: Array) -> Array:
    tiles, rows = _Tiles(sizes), len(x)
    x = jnp.pad(x, ((0, _TILE), (0, 0)))

    def body(i: Array, out: Array) -> Array:
        group, start, _ = tiles.at(i)
        tile = lax.dynamic_slice_in_dim(x, start, _TILE) @ kernels[group]
        # What reaches beyond the group is overwritten by the next one's tile.
        return lax.dynamic_update_slice_in_dim(out, tile, start, 0)

    out = lax.fori_loop(0, tiles.behind[-1], body, _zeros((len(x), kernels.shape[2]), x))[:rows]
    return jnp.where(jnp.arange(rows)[:, None] < tiles.ends[-1], out, 0)


def _tiled_outer(x: Array, g: Array, sizes: Array) -> Array:
    tiles = _Tiles(sizes)
    x, g = (jnp.pad(rows, ((0, _TILE), (0, 0))) for rows in (x, g))

    def body(i: Array, out: Array) -> Array:
        group, start, left = tiles.at(i)
        mine = jnp.arange(_TILE)[:, None] < left
        tile = jnp.where(mine, lax.dynamic_slice_in_dim(x, start, _TILE), 0)
        # Rows times columns: over a leading axis of both sides XLA's CPU kernels are half as fast.
        product = lax.optimization_barrier(tile.T) @ lax.dynamic_slice_in_dim(g, start, _TILE)
        return out.at[group].add(product.astype(jnp.float32))

    shape = (len(sizes), x.shape[1], g.shape[1])
    return lax.fori_loop(0, tiles.behind[-1], body, _zeros(shape, x).astype(jnp.float32)).astype(x.dtype)


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros in the dtype of `like` that differ between the devices of a `shard_map` where `like` does."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    zeros = jnp.zeros(shape, like.dtype)
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def sort_pairs(x: Array, order: Array, inverse: Array, k: int) -> Array:
    """x [n, D] -> [n k, D]: the row of its token for every pair in `order`, where pair p is token p // k's.

    `inverse` undoes the permutation `order` [n k], so that the gradient gathers where autodiff would scatter.
    """
    return x[order // k]


def _sort_fwd(x: Array, order: Array, inverse: Array, k: int) -> tuple[Array, Array]:
    return sort_pairs(x, order, inverse, k), inverse


def _sort_bwd(k: int, inverse: Array, g: Array) -> tuple[Array, None, None]:
    return g[inverse].reshape(-1, k, g.shape[1]).sum(1), None, None


sort_pairs.defvjp(_sort_fwd, _sort_bwd)


@jax.custom_vjp
def unsort_pairs(y: Array, order: Array, inverse: Array) -> Array:
    """y [n k, D], sorted by `order` -> [n k, D] in the pairs' own order, with a gradient that gathers."""
    return y[inverse]


def _unsort_fwd(y: Array, order: Array, inverse: Array) -> tuple[Array, Array]:
    return unsort_pairs(y, order, inverse), order


def _unsort_bwd(order: Array, g: Array) -> tuple[Array, None, None]:
    return g[order], None, None


unsort_pairs.defvjp(_unsort_fwd, _unsort_bwd)
