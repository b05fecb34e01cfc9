"""Frozen kernels in 8 or 4 bits (QLoRA, https://arxiv.org/abs/2305.14314): blocks of up to 64 weights share a scale.

A kernel is dequantised where it is used, in the forward and again in the backward pass, so it is never saved between.
Two 4-bit codes are packed into a byte here: jax's 4-bit arrays take a byte each on CPU outside of compiled programs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.types import Array, Params

Kind = Literal["int8", "nf4"]
BLOCK = 64
_BLOCK_AXES = ("head_dim", "mlp")  # these are whole, or split into far more than a block, on any mesh
_KEPT = ("experts", "router")  # not a `Linear`, and a choice that rounding would change

# Quantiles of a normal distribution, and 0: appendix E of the paper.
_NEGATIVE = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
_NEAR_ZERO = (-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
_POSITIVE = (0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
_LARGE = (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
_NF4 = np.array([*_NEGATIVE, *_NEAR_ZERO, *_POSITIVE, *_LARGE], np.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A kernel in few bits. A pytree: it is stacked, scanned and sharded like the kernel that it stands for."""

    codes: Array  # int8, or uint8 with two codes each: those of the first and of the second half of a block
    scales: Array  # float32, one a block
    kind: Kind = field(metadata={"static": True})
    axis: int = field(metadata={"static": True})  # along which the blocks lie, counted from the end

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] *= 2 if self.kind == "nf4" else 1
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def dtype(self) -> Any:
        """That of the kernel once it is dequantised to be merged."""
        return self.scales.dtype


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


def quantize(kernel: Any, axes: tuple[str, ...], kind: Kind) -> Quantized:
    """A kernel [L, ...] as blocks with scales, which lie on the mesh as the kernel does.

    Raises ValueError where the mesh would cut through the blocks, or an odd size leaves none for 4 bits.
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
    if block % 2:
        raise ValueError(f"model.quantize={kind}: axis {axes[axis]!r} of a kernel {kernel.shape} is of an odd size")
    run = functools.partial(_quantize, kind=kind, axis=axis - len(axes), block=block)
    if isinstance(kernel, jax.ShapeDtypeStruct):
        shapes = jax.eval_shape(run, kernel)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
    return jax.jit(run, out_shardings=sharding)(kernel)


def dense(kernel: Array | Quantized, dtype: Any) -> Array:
    """A kernel as an array, whether it is quantised or not."""
    if not isinstance(kernel, Quantized):
        return kernel.astype(dtype)
    axis = kernel.ndim + kernel.axis
    codes = _blocks(kernel.codes, axis, kernel.codes.shape[axis] // kernel.scales.shape[axis])
    if kernel.kind == "nf4":
        values = jnp.asarray(_NF4)[jnp.concatenate([codes & 15, codes >> 4], axis + 1)]
    else:
        values = codes.astype(jnp.float32) / 127
    return (values * jnp.expand_dims(kernel.scales, axis + 1)).astype(dtype).reshape(kernel.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def project_quantized(x: Array, kernel: Quantized, rank: int) -> Array:
    """`ops.project.project` for a quantised kernel, which is a constant: only `x` has a derivative."""
    return jnp.tensordot(x, dense(kernel, x.dtype), rank)


@project_quantized.defjvp
def _project_quantized_jvp(
    rank: int, primals: tuple[Array, Quantized], tangents: tuple[Array, Any]
) -> tuple[Array, Array]:
    x, kernel = primals
    return project_quantized(x, kernel, rank), _tangent(tangents[0], kernel, rank)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def _tangent(d_x: Array, kernel: Quantized, rank: int) -> Array:
    """`jax.checkpoint` dequantises the kernel again in the backward pass instead of saving it."""
    return jnp.tensordot(d_x, dense(kernel, d_x.dtype), rank)


def _quantize(kernel: Array, *, kind: Kind, axis: int, block: int) -> Quantized:
    at = kernel.ndim + axis
    blocks = _blocks(kernel.astype(jnp.float32), at, block)
    scales = jnp.abs(blocks).max(at + 1)
    unit = blocks / jnp.expand_dims(jnp.where(scales == 0, 1, scales), at + 1)
    if kind == "nf4":
        nearest = jnp.searchsorted(jnp.asarray((_NF4[1:] + _NF4[:-1]) / 2), unit).astype(jnp.uint8)
        first, second = jnp.split(nearest, 2, at + 1)
        codes = first | (second << 4)
    else:
        codes = jnp.round(unit * 127).astype(jnp.int8)
    shape = (*kernel.shape[:at], -1, *kernel.shape[at + 1 :])
    return Quantized(codes.reshape(shape), scales, kind, axis)


def _blocks(x: Array, axis: int, block: int) -> Array:
    """[..., n * block, ...] -> [..., n, block, ...]."""
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
