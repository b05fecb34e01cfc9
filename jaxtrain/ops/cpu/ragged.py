"""Products of groups of rows with one matrix per group, as loops over tiles for XLA's CPU backend.

XLA's CPU backend multiplies every row by every group's matrix in `lax.ragged_dot`. A loop over tiles multiplies each
row once, at the cost of half a tile per group.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Integer

from jaxtrain.ops.varying import varying_as

_TILE = 64  # rows of one group that are multiplied by its matrix at once


class _Tiles:
    """Groups cut into tiles of `_TILE` rows. A group's last tile may extend into the next group or past the end."""

    def __init__(self, sizes: Array):
        self.ends = jnp.cumsum(sizes)
        self.sizes = sizes
        self.count = -(-sizes // _TILE)
        self.last_tiles = jnp.cumsum(self.count)

    def at(self, i: Array | int) -> tuple[Array, Array, Array]:
        """The group of tile i, its first row, and how many rows of the group remain from there."""
        group = jnp.searchsorted(self.last_tiles, i, side="right", method="compare_all")
        first = (i - (self.last_tiles[group] - self.count[group])) * _TILE
        return group, self.ends[group] - self.sizes[group] + first, self.sizes[group] - first


def grouped_matmul(
    x: Float[Array, "M I"], kernels: Float[Array, "G I O"], sizes: Integer[Array, " G"]
) -> Float[Array, "M O"]:
    """Each row times the matrix of its group; 0 in rows that belong to no group."""
    tiles, rows = _Tiles(sizes), len(x)
    x = jnp.pad(x, ((0, _TILE), (0, 0)))

    def body(i: Array | int, out: Array) -> Array:  # an int outside of jit
        group, start, _ = tiles.at(i)
        tile = lax.dynamic_slice_in_dim(x, start, _TILE) @ kernels[group]
        # Rows past the end of the group are overwritten by the next group's first tile.
        return lax.dynamic_update_slice_in_dim(out, tile, start, 0)

    out = lax.fori_loop(0, tiles.last_tiles[-1], body, varying_as(jnp.zeros((len(x), kernels.shape[2]), x.dtype), x))[
        :rows
    ]
    return jnp.where(jnp.arange(rows)[:, None] < tiles.ends[-1], out, 0)


def grouped_outer(x: Float[Array, "M I"], g: Float[Array, "M O"], sizes: Integer[Array, " G"]) -> Float[Array, "G I O"]:
    """The product x^T g of every group, summed in float32."""
    tiles = _Tiles(sizes)
    x, g = (jnp.pad(rows, ((0, _TILE), (0, 0))) for rows in (x, g))

    def body(i: Array | int, out: Array) -> Array:  # an int outside of jit
        group, start, remaining = tiles.at(i)
        in_group = jnp.arange(_TILE)[:, None] < remaining
        x_tile, g_tile = (jnp.where(in_group, lax.dynamic_slice_in_dim(rows, start, _TILE), 0) for rows in (x, g))
        # See `ops.cpu.matmul`: the kernels are fastest for rows times columns.
        product = lax.optimization_barrier(x_tile.T) @ g_tile
        return out.at[group].add(product.astype(jnp.float32))

    shape = (len(sizes), x.shape[1], g.shape[1])
    return lax.fori_loop(0, tiles.last_tiles[-1], body, varying_as(jnp.zeros(shape), x)).astype(x.dtype)
