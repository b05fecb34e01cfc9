"""Frozen kernels in 8 or 4 bits (QLoRA, https://arxiv.org/abs/2305.14314): blocks of up to 64 weights share a scale.

qwix's quantised arrays, used as plain arrays: they are pytrees, so they are stacked, scanned and sharded like a kernel.
A kernel is dequantised where it is used, in the forward and again in the backward pass, so it is never saved between.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxtrain.types import Array, Params

Kind = Literal["int8", "nf4"]
BLOCK = 64
_BLOCK_AXES = ("head_dim", "mlp")  # these are whole, or split into far more than a block, on any mesh
_KEPT = ("experts", "router")  # not a `Linear`, and a choice that rounding would change


def quantize_kernels(base: Params, axes: Params, kind: Kind) -> Params:
    """The tree with every linear's kernel quantised, as it lies on the mesh. Embedding, head and norms stay.

    Leaves are arrays, or `jax.ShapeDtypeStruct`s with shardings, which become structs again. `axes`: logical axes.
    """
    done = dict(base)
    for name, node in base.items():
        if name in _KEPT or not isinstance(node, dict):
            continue
        done[name] = quantize_kernels(node, axes[name], kind)
        if "kernel" in node and axes[name]["kernel"][0] == "layers":
            done[name]["kernel"] = quantize(node["kernel"], axes[name]["kernel"], kind)
    return done


def quantize(kernel: Any, axes: tuple[str, ...], kind: Kind) -> Any:
    """A kernel [L, ...] as a `qwix.QArray` with the kernel's sharding.

    Raises ValueError where the mesh would cut through the blocks.
    """
    axis = next(i for i in reversed(range(len(axes))) if axes[i] in _BLOCK_AXES)
    block = math.gcd(kernel.shape[axis], BLOCK)  # of the whole axis, so that it is the same on any mesh
    sharding = kernel.sharding
    part = sharding.shard_shape(kernel.shape)[axis]
    if part % block:
        raise ValueError(
            f"model.quantize={kind}: a kernel {kernel.shape} of axes {axes} is cut into parts of {part} along "
            f"{axes[axis]!r}, which are no whole blocks of {block}; use fewer devices on that mesh axis"
        )
    run = functools.partial(_quantize, kind=kind, axis=axis, block=block)
    if isinstance(kernel, jax.ShapeDtypeStruct):
        shapes = jax.eval_shape(run, kernel)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
    return jax.jit(run, out_shardings=sharding)(kernel)


def dense(kernel: Any, dtype: Any) -> Array:
    """A kernel as an array, whether it is quantised or not."""
    if isinstance(kernel, jax.Array):
        return kernel.astype(dtype)
    return _qwix().dequantize(kernel).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project_quantized(x: Array, kernel: Any, rank: int) -> Array:
    """`ops.project.project` for a quantised kernel, which has no gradient."""
    return jnp.tensordot(x, dense(kernel, x.dtype), rank)


def _forward(x: Array, kernel: Any, rank: int) -> tuple[Array, Any]:
    return project_quantized(x, kernel, rank), kernel


def _backward(rank: int, kernel: Any, g: Array) -> tuple[Array, None]:
    wide = dense(kernel, g.dtype)
    outputs = wide.ndim - rank
    last = tuple(range(g.ndim - outputs, g.ndim)), tuple(range(rank, wide.ndim))
    return lax.dot_general(g, wide, (last, ((), ()))), None


project_quantized.defvjp(_forward, _backward)


def _quantize(kernel: Array, *, kind: Kind, axis: int, block: int) -> Any:
    others = tuple(i for i in range(kernel.ndim) if i != axis)
    return _qwix().quantize(kernel, kind, channelwise_axes=others, tiled_axes={axis: block}, scale_dtype=jnp.float32)


def _qwix() -> Any:
    try:
        import qwix
    except ModuleNotFoundError:
        raise ValueError('model.quantize needs qwix: pip install "jaxtrain[quantize]"') from None
    return qwix
