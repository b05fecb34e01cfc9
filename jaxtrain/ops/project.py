"""Matrix products with forms that are fast on each platform."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from jaxtrain.ops.cpu import matmul as cpu
from jaxtrain.types import Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def project(x: Float[Array, "..."], kernel: Float[Array, "..."], rank: int) -> Float[Array, "..."]:
    """x [..., *in] @ kernel [*in, *out] over the last `rank` axes of x -> [..., *out].

    Differentiable in forward and reverse mode, any number of times. The value is a plain tensordot; only the form of
    the kernel's gradient depends on the platform.
    """
    return jnp.tensordot(x, kernel, rank)


def _project_jvp(rank: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    x, kernel = primals
    d_x, d_kernel = tangents
    y = project(x, kernel, rank)
    # A frozen kernel has no tangent, and neither do the inputs of a first layer.
    terms = [] if isinstance(d_x, SymbolicZero) else [project(d_x, kernel, rank)]
    if not isinstance(d_kernel, SymbolicZero):
        terms.append(_kernel_tangent(x, d_kernel, rank))
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


project.defjvp(_project_jvp, symbolic_zeros=True)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def _kernel_tangent(x: Array, d_kernel: Array, rank: int) -> Array:
    """x @ d_kernel, whose transpose with respect to `d_kernel` is the kernel's gradient.

    `jax.checkpoint` makes x itself what reverse mode saves: without it the CPU form would save a transposed copy of x
    for every projection of it.
    """
    # Resolved at lowering, so a CPU host that compiles for another platform gets the form of that platform.
    return lax.platform_dependent(
        x,
        d_kernel,
        cpu=functools.partial(cpu.project_tangent, rank=rank),
        default=functools.partial(jnp.tensordot, axes=rank),
    )


def project_on_table(x: Float[Array, "*tokens D"], table: Float[Array, "V D"]) -> Float[Array, "*tokens V"]:
    """`x @ table.T` in float32: the logits of a tied head."""
    rows = x.reshape(-1, x.shape[-1])
    logits = lax.platform_dependent(rows, table, cpu=cpu.project_on_table, default=_project_on_table)
    return logits.reshape(*x.shape[:-1], len(table))


def _project_on_table(rows: Array, table: Array) -> Array:
    return lax.dot_general(rows, table, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
