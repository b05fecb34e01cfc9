"""Grouped matrix products: each group of rows is multiplied by its own matrix."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Integer

from jaxtrain.ops.cpu import ragged as cpu
from jaxtrain.ops.gpu import ragged as gpu
from jaxtrain.ops.gpu.described import described
from jaxtrain.ops.tpu import ragged as tpu


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "M I"], kernels: Float[Array, "G I O"], sizes: Integer[Array, " G"]
) -> Float[Array, "M O"]:
    """Each row times the matrix of its group. Differentiable once, in reverse mode, by `x` and `kernels`.

    `x` is sorted by group and has the dtype of `kernels`; `sizes` are the rows of each group, possibly 0. Rows at the
    end may belong to no group: they give 0.
    """
    return _matmul(x, kernels, sizes, transpose=False)


def _forward(x: Array, kernels: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_matmul(x, kernels, sizes), (x, kernels, sizes)


def _backward(saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None]:
    x, kernels, sizes = saved
    d_x = _matmul(g, kernels, sizes, transpose=True)
    forms: dict[str, Callable[..., Array]] = {"tpu": tpu.grouped_outer} if tpu.supports(x.dtype) else {}
    if _uses_gpu_kernels(x, kernels):
        forms["cuda"] = gpu.grouped_outer
    d_kernels = lax.platform_dependent(x, g, sizes, cpu=cpu.grouped_outer, default=_ragged_outer, **forms)
    return d_x, d_kernels, None


grouped_matmul.defvjp(_forward, _backward)


def _matmul(x: Array, kernels: Array, sizes: Array, transpose: bool) -> Array:
    """x [M, I], kernels [G, I, O], or [G, O, I] with `transpose`, -> [M, O]."""

    def of_axes(product: Callable[..., Array]) -> Callable[..., Array]:
        return lambda x, kernels, sizes: product(x, kernels.swapaxes(1, 2) if transpose else kernels, sizes)

    forms: dict[str, Callable[..., Array]] = {}
    if tpu.supports(x.dtype):
        forms["tpu"] = functools.partial(tpu.grouped_matmul, transpose=transpose)
    if _uses_gpu_kernels(x, kernels):
        forms["cuda"] = functools.partial(gpu.grouped_matmul, transpose=transpose)
    # Resolved at lowering, so a CPU host that compiles for another platform gets the form of that platform.
    return lax.platform_dependent(
        x,
        kernels,
        sizes,
        cpu=of_axes(cpu.grouped_matmul),
        default=of_axes(lax.ragged_dot),
        **forms,
    )


def _uses_gpu_kernels(x: Array, kernels: Array) -> bool:
    if not gpu.supports(x, *kernels.shape[1:]):
        return False
    return described.get() or gpu.kernels_agree(lax.ragged_dot, _ragged_outer)


def _ragged_outer(x: Array, g: Array, sizes: Array) -> Array:
    """x [M, I], g [M, O] -> [G, I, O]: the product x^T g of every group."""
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(x, g, sizes, numbers)


@jax.custom_vjp
def copies_of_tokens(
    x: Float[Array, "n D"], tokens: Integer[Array, " S"], slots: Integer[Array, "n k"]
) -> Float[Array, "S D"]:
    """The row of its token for every slot: `x[tokens]`.

    Token t has the slots `slots[t]`; other slots are padding, copies of any token. Gradients gather where autodiff
    would scatter: that by `x` ignores padding, and that of `sums_of_slots` gives it a copy of any token's.
    """
    return x[tokens]


def _copies_fwd(x: Array, tokens: Array, slots: Array) -> tuple[Array, tuple[Array, Array]]:
    return copies_of_tokens(x, tokens, slots), (tokens, slots)


def _copies_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    return sums_of_slots(g, *saved), None, None


copies_of_tokens.defvjp(_copies_fwd, _copies_bwd)


@jax.custom_vjp
def sums_of_slots(
    y: Float[Array, "S D"], tokens: Integer[Array, " S"], slots: Integer[Array, "n k"]
) -> Float[Array, "n D"]:
    """The sum of the rows of each token's slots: the transpose of `copies_of_tokens`."""
    # A gather for each addend: XLA for TPU adds 16-bit arrays several times as fast as it sums over an axis of one.
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return functools.reduce(jnp.add, [y[places].astype(wide) for places in slots.T]).astype(y.dtype)


def _sums_fwd(y: Array, tokens: Array, slots: Array) -> tuple[Array, tuple[Array, Array]]:
    return sums_of_slots(y, tokens, slots), (tokens, slots)


def _sums_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    return copies_of_tokens(g, *saved), None, None


sums_of_slots.defvjp(_sums_fwd, _sums_bwd)
