"""Products of groups of rows with one matrix per group, by JAX's Pallas kernels for Hopper GPUs (Mosaic).

XLA:GPU multiplies every row by every group's matrix. The kernels compile for H100, but have not been run by us on one:
so a process compares them with XLA on its own GPU first, and uses XLA where they do not agree.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer

from jaxtrain.ops.varying import varying_as

log = logging.getLogger(__name__)

_TUNING = {"block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 1}
_BLOCKS = (128, 192, 64)  # widths of a block that the kernels take, the best first
_TOLERANCE = 2e-2  # of the largest value, for products of 16-bit floats

Product = Callable[[Array, Array, Array], Array]


def grouped_matmul(
    x: Float[Array, "M I"], kernels: Float[Array, "G J O"], sizes: Integer[Array, " G"], *, transpose: bool = False
) -> Float[Array, "M N"]:
    """Each row times the matrix of its group, or with `transpose` times its transpose; 0 in rows of no group."""
    y = _module("ragged_dot_mgpu").ragged_dot(
        x,
        kernels,
        group_sizes=sizes,
        transpose_rhs=transpose,
        block_m=128,
        block_n=_block(kernels.shape[1 if transpose else 2]),
        **_TUNING,
    )
    # The kernel does not write rows that belong to no group.
    return jnp.where(jnp.arange(len(x))[:, None] < sizes.sum(), varying_as(y, x), 0)


def grouped_outer(x: Float[Array, "M I"], g: Float[Array, "M O"], sizes: Integer[Array, " G"]) -> Float[Array, "G I O"]:
    """The product x^T g of every group, summed in float32. Rows that belong to no group must be finite."""
    y = _module("transposed_ragged_dot_mgpu").transposed_ragged_dot(
        x, g, group_sizes=sizes, block_m=_block(x.shape[1]), block_n=_block(g.shape[1]), **_TUNING
    )
    return varying_as(y, x)


def supports(x: Array, *widths: int) -> bool:
    """Whether the kernels take rows of the dtype of `x`, and matrices of these widths."""
    return x.dtype in (jnp.bfloat16, jnp.float16) and all(width % 64 == 0 for width in widths)


@functools.cache
def kernels_agree(matmul: Product, outer: Product) -> bool:
    """Whether this process has a GPU on which the kernels give what `matmul` and `outer` do; a warning if not.

    The processes of a run must have equal GPUs and equal versions of JAX, so that all come to the same result.
    """
    if jax.default_backend() != "gpu":
        return False
    try:
        with jax.ensure_compile_time_eval():
            found, expected = _products(grouped_matmul, grouped_outer), _products(matmul, outer)
        worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))
        reason = None if worst < _TOLERANCE else f"they differ from XLA by {worst:.1e} of the largest value"
    except Exception as error:  # of whatever kind: kernels that do not compile are no reason to end a run
        reason = f"{type(error).__name__}: {error}"
    if reason:
        log.warning(
            "The kernels for mixtures of experts on GPUs (jax.experimental.pallas.ops.gpu) are not used: %s. XLA's "
            "multiply every token by every expert, which is many times slower.",
            reason,
        )
    return reason is None


def _products(matmul: Product, outer: Product) -> list[np.ndarray]:
    """Values of a problem with an empty group, groups that are no multiple of a block, and rows of no group."""
    sizes = jnp.asarray([70, 0, 129, 20], jnp.int32)
    shapes = ((256, 256), (4, 256, 128), (256, 128))
    x, kernels, g = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    values = jax.jit(matmul)(x, kernels, sizes), jax.jit(outer)(x, g, sizes)
    return [np.asarray(value, np.float32) for value in values]


def _block(width: int) -> int:
    return next(block for block in _BLOCKS if width % block == 0)


def _module(name: str) -> Any:
    """Imported when they are used: the modules import JAX's test utilities, which need absl-py."""
    return importlib.import_module(f"jax.experimental.pallas.ops.gpu.{name}")
