"""Products of groups of rows with one matrix per group, by megablox, JAX's Pallas kernels for TPU.

`lax.ragged_dot_general` that contracts the rows has no kernel in XLA:TPU: every group multiplies all rows. The kernel
of `lax.ragged_dot` reads each matrix once per 128 rows; here it is once per `_ROWS` rows.
"""

import importlib
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Integer

from jaxtrain.ops.varying import untyped

# The package exports a function under the name of the module.
_kernels: Any = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

_ROWS = 512  # rows of a block. MaxText's default blocks, which fit the vector memory of v5e, v5p and v6e
_WIDTH = 1024
_ROW_TILE = 16  # rows of a register tile of 16-bit floats


def supports(dtype: jnp.dtype) -> bool:
    """Whether the kernels take this type."""
    return dtype in (jnp.bfloat16, jnp.float32)


def grouped_matmul(
    x: Float[Array, "M I"],
    kernels: Float[Array, "G J O"],
    sizes: Integer[Array, " G"],
    *,
    transpose: bool = False,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """Each row times the matrix of its group, or with `transpose` times its transpose; 0 in rows of no group."""
    rows, width = len(x), kernels.shape[1 if transpose else 2]
    tiling = _tiling(rows, x.shape[1], width)
    kernel = partial(
        _kernels.gmm, preferred_element_type=x.dtype, tiling=tiling, transpose_rhs=transpose, interpret=interpret
    )
    y = untyped(kernel, _padded(x, tiling[0]), kernels, sizes)[:rows]
    # The kernel does not write blocks in which no row belongs to a group.
    return jnp.where(jnp.arange(rows)[:, None] < sizes.sum(), y, 0)


def grouped_outer(
    x: Float[Array, "M I"], g: Float[Array, "M O"], sizes: Integer[Array, " G"], *, interpret: bool = False
) -> Float[Array, "G I O"]:
    """The product x^T g of every group, summed in float32."""
    tiling = _tiling(len(x), x.shape[1], g.shape[1])

    def kernel(x: Array, g: Array, sizes: Array) -> Array:
        return _kernels.tgmm(x.T, g, sizes, preferred_element_type=x.dtype, tiling=tiling, interpret=interpret)

    return untyped(kernel, _padded(x, tiling[0]), _padded(g, tiling[0]), sizes)


def _tiling(rows: int, *widths: int) -> tuple[int, ...]:
    return min(_ROWS, -(-rows // _ROW_TILE) * _ROW_TILE), *map(_block, widths)


def _block(width: int) -> int:
    """The whole width if it is small, else the block that needs the least padding; ties: the largest."""
    return width if width <= _WIDTH else min((_WIDTH, _WIDTH * 3 // 4, _WIDTH // 2), key=lambda block: -width % block)


def _padded(x: Array, multiple: int) -> Array:
    return jnp.pad(x, ((0, -len(x) % multiple), (0, 0)))
