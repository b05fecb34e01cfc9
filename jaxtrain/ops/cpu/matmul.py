"""Matrix products arranged for XLA's CPU backend.

Its kernels are fastest for rows times columns: a product that contracts the leading axis of both operands takes twice
as long, and the right operand is repacked at every call. The functions here transpose an operand first. The
optimization barriers keep XLA from folding that transpose back into the product.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax

from jaxtrain.types import Array


def project_tangent(x: Array, d_kernel: Array, rank: int) -> Array:
    """x [..., *in] @ d_kernel [*in, *out] -> [..., *out], to be transposed with respect to `d_kernel`.

    Autodiff turns the products below into the fast form of the kernel's gradient `x^T @ g`: the narrower of `x` and `g`
    is transposed. `project` computes no values with this function in reverse mode.
    """
    in_shape, out_shape = d_kernel.shape[:rank], d_kernel.shape[rank:]
    rows = x.reshape(-1, math.prod(in_shape))
    matrix = d_kernel.reshape(math.prod(in_shape), math.prod(out_shape))
    if matrix.shape[0] <= matrix.shape[1]:
        y = lax.dot_general(lax.optimization_barrier(rows.T), matrix, (((0,), (0,)), ((), ())))
    else:
        turned = lax.dot_general(lax.optimization_barrier(matrix.T), rows, (((1,), (1,)), ((), ())))
        y = lax.optimization_barrier(turned).T
    return y.reshape(*x.shape[: x.ndim - rank], *out_shape)


def outer(x: Array, y: Array) -> Array:
    """x [C, D], y [C, V] -> x^T y [D, V] in float32."""
    return lax.dot_general(
        lax.optimization_barrier(x.T), y, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def project_on_table(rows: Array, table: Array) -> Array:
    """rows [M, D] . table [V, D] -> float32 [M, V], without repacking the table."""
    logits = lax.dot_general(table, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return lax.optimization_barrier(logits).T
