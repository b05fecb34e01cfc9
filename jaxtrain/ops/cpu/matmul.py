"""Matrix products arranged for XLA's CPU backend.

Its kernels are fastest for rows times columns: a product that contracts the leading axis of both operands takes twice
as long, and the right operand is repacked at every call. The functions here transpose an operand first. The
optimization barriers prevent XLA from merging that transpose with the product.
"""

import math

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float


def project_tangent(x: Float[Array, "..."], d_kernel: Float[Array, "..."], rank: int) -> Float[Array, "..."]:
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
        transposed = lax.dot_general(lax.optimization_barrier(matrix.T), rows, (((1,), (1,)), ((), ())))
        y = lax.optimization_barrier(transposed).T
    return y.reshape(*x.shape[: x.ndim - rank], *out_shape)


def outer_product(x: Float[Array, "C D"], y: Float[Array, "C V"]) -> Float[Array, "D V"]:
    """x^T y in float32."""
    return lax.dot_general(
        lax.optimization_barrier(x.T), y, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def project_on_table(rows: Float[Array, "M D"], table: Float[Array, "V D"]) -> Float[Array, "M V"]:
    """rows . table^T in float32, without repacking the table."""
    logits = lax.dot_general(table, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return lax.optimization_barrier(logits).T
