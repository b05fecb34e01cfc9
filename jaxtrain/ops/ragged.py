"""Matrix products of groups of rows, each group with a matrix of its own, whatever the sizes of the groups."""

from __future__ import annotations

import functools

import jax
from jax import lax

from jaxtrain.ops.cpu import ragged as cpu
from jaxtrain.types import Array


@jax.custom_vjp
def grouped_matmul(x: Array, kernels: Array, sizes: Array) -> Array:
    """Rows times the matrix of their group. Differentiable once by `x` and `kernels`.

    x [M, I], sorted by group; kernels [G, I, O] in x's dtype; sizes [G] int32, the rows of each group, which may be
    none and may leave rows at the end to nobody -> [M, O], 0 in the rows that are nobody's.
    """
    # Resolved when the program is lowered, so a CPU host compiles for other platforms what they would run.
    return lax.platform_dependent(x, kernels, sizes, cpu=cpu.grouped_matmul, default=lax.ragged_dot)


def _forward(x: Array, kernels: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_matmul(x, kernels, sizes), (x, kernels, sizes)


def _backward(saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None]:
    x, kernels, sizes = saved
    d_x = grouped_matmul(g, kernels.swapaxes(1, 2), sizes)
    return d_x, lax.platform_dependent(x, g, sizes, cpu=cpu.grouped_outer, default=_ragged_outer), None


grouped_matmul.defvjp(_forward, _backward)


def _ragged_outer(x: Array, g: Array, sizes: Array) -> Array:
    """x [M, I], g [M, O] -> [G, I, O]: the product x^T g of every group."""
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(x, g, sizes, numbers)


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
