"""Grouped matrix products: each group of rows is multiplied by its own matrix."""

import functools

import jax
from jax import Array, lax
from jaxtyping import Float, Integer

from jaxtrain.ops.cpu import ragged as cpu


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "M I"], kernels: Float[Array, "G I O"], sizes: Integer[Array, " G"]
) -> Float[Array, "M O"]:
    """Each row times the matrix of its group. Differentiable once, in reverse mode, by `x` and `kernels`.

    `x` is sorted by group and has the dtype of `kernels`; `sizes` are the rows of each group, possibly 0. Rows at the
    end may belong to no group: they give 0.
    """
    # Resolved at lowering, so a CPU host that compiles for another platform gets the form of that platform.
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
def sort_pairs(
    x: Float[Array, "n D"], order: Integer[Array, " pairs"], inverse: Integer[Array, " pairs"], k: int
) -> Float[Array, "pairs D"]:
    """The row of its token for every pair in `order`, where pair p belongs to token p // k.

    `inverse` undoes the permutation `order` [n k], so that the gradient gathers where autodiff would scatter.
    """
    return x[order // k]


def _sort_fwd(x: Array, order: Array, inverse: Array, k: int) -> tuple[Array, Array]:
    return sort_pairs(x, order, inverse, k), inverse


def _sort_bwd(k: int, inverse: Array, g: Array) -> tuple[Array, None, None]:
    return g[inverse].reshape(-1, k, g.shape[1]).sum(1), None, None


sort_pairs.defvjp(_sort_fwd, _sort_bwd)


@jax.custom_vjp
def unsort_pairs(
    y: Float[Array, "pairs D"], order: Integer[Array, " pairs"], inverse: Integer[Array, " pairs"]
) -> Float[Array, "pairs D"]:
    """The inverse of the permutation `order`, with a gradient that gathers."""
    return y[inverse]


def _unsort_fwd(y: Array, order: Array, inverse: Array) -> tuple[Array, Array]:
    return unsort_pairs(y, order, inverse), order


def _unsort_bwd(order: Array, g: Array) -> tuple[Array, None, None]:
    return g[order], None, None


unsort_pairs.defvjp(_unsort_fwd, _unsort_bwd)
