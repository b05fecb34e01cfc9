"""Linear maps that are fast matrix products on every platform."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: Array, kernel: Array, rank: int) -> Array:
    """x [..., *in] @ kernel [*in, *out] over the last `rank` axes of x -> [..., *out]. Differentiable once.

    The weight's gradient is the product that needs care.
    """
    return jnp.tensordot(x, kernel, rank)


def _project_fwd(x: Array, kernel: Array, rank: int) -> tuple[Array, tuple[Array, Array]]:
    return project(x, kernel, rank), (x, kernel)


def _project_bwd(rank: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    out_rank = kernel.ndim - rank
    d_x = lax.dot_general(g, kernel, ((_last(g, out_rank), _last(kernel, out_rank)), ((), ())))
    # Resolved when the program is lowered, so a CPU host compiles for other platforms what they would run.
    d_kernel = lax.platform_dependent(
        x, g, cpu=functools.partial(_on_cpu, rank=rank), default=functools.partial(_anywhere, rank=rank)
    )
    return d_x, d_kernel


project.defvjp(_project_fwd, _project_bwd)


def _anywhere(x: Array, g: Array, rank: int) -> Array:
    leading = tuple(range(x.ndim - rank))
    return lax.dot_general(x, g, ((leading, leading), ((), ())))


def _on_cpu(x: Array, g: Array, rank: int) -> Array:
    """XLA's CPU kernels are half as fast over a leading axis of both sides as on rows times columns.

    So the narrower side is transposed first; the barriers keep XLA from folding that into the product again.
    """
    in_shape, out_shape = x.shape[x.ndim - rank :], g.shape[x.ndim - rank :]
    x, g = x.reshape(-1, math.prod(in_shape)), g.reshape(-1, math.prod(out_shape))
    if x.shape[1] <= g.shape[1]:
        d_kernel = lax.optimization_barrier(x.T) @ g
    else:
        d_kernel = lax.optimization_barrier(lax.optimization_barrier(g.T) @ x).T
    return d_kernel.reshape(*in_shape, *out_shape)


def project_on_table(x: Array, table: Array) -> Array:
    """x [..., D] . table [V, D] -> float32 [..., V]: logits of a head that is the embedding."""
    rows = x.reshape(-1, x.shape[-1])
    logits = lax.platform_dependent(rows, table, cpu=_table_first, default=_rows_first)
    return logits.reshape(*x.shape[:-1], len(table))


def _rows_first(rows: Array, table: Array) -> Array:
    return lax.dot_general(rows, table, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _table_first(rows: Array, table: Array) -> Array:
    """XLA's CPU kernels repack their right side at every call, which here would be the whole table.

    The barrier keeps XLA from folding the transpose into the product, sides exchanged.
    """
    return lax.optimization_barrier(_rows_first(table, rows)).T


def _last(x: Array, rank: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - rank, x.ndim))
