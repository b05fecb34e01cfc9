"""Frozen kernels in 8 or 4 bits (QLoRA, https://arxiv.org/abs/2305.14314): blocks of up to 64 weights share a scale.

A kernel is dequantised in the forward pass and again in the backward pass, so the dequantised kernel is never saved.
Two 4-bit codes are packed into a byte here, because the 4-bit arrays of JAX take a byte per element on CPU outside of
compiled programs.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxtrain.types import Array, Params

QuantizedFormat = Literal["int8", "nf4"]
BLOCK = 64
_BLOCK_AXES = ("head_dim", "mlp")  # on any mesh these are unsharded, or their shards are much larger than a block
_NOT_QUANTIZED = ("experts", "router", "shared_gate", "beta_proj", "decay_proj")
"""Experts are no `Linear`; rounding would change the choices of a router; the others have a few columns."""

# Quantiles of a normal distribution, and 0: appendix E of the paper.
_NEGATIVE = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
_NEAR_ZERO = (-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
_POSITIVE = (0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
_LARGE = (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
_NF4 = np.array([*_NEGATIVE, *_NEAR_ZERO, *_POSITIVE, *_LARGE], np.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A quantised kernel. A pytree, stacked, scanned and sharded like the kernel that it represents."""

    # Arrays; in trees of the same structure other leaves, such as shardings.
    codes: Any  # int8; or uint8 with two codes: one of the first and one of the second half of a block
    scales: Any  # float32, one per block
    kind: QuantizedFormat = field(metadata={"static": True})
    axis: int = field(metadata={"static": True})  # the axis of the blocks, counted from the end

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
        """The dtype of the dequantised kernel that adapters are merged into."""
        return self.scales.dtype


def quantize_kernels(base: Any, axes: Params, kind: QuantizedFormat) -> Any:
    """The tree with the kernels of all linears quantised, with their shardings. Embedding, head and norms stay.

    Leaves are arrays, or `jax.ShapeDtypeStruct`s with shardings, which give structs. `axes`: logical axes.
    """
    quantized = dict(base)
    for name, node in base.items():
        if name in _NOT_QUANTIZED or not isinstance(node, dict):
            continue
        inner = axes[name]
        assert isinstance(inner, dict)
        quantized[name] = quantize_kernels(node, inner, kind)
        kernel_axes = inner.get("kernel")
        if isinstance(kernel_axes, tuple) and kernel_axes[0] == "layers":
            quantized[name]["kernel"] = quantize(node["kernel"], kernel_axes, kind)
    return quantized


def is_quantized(path: str, axes: tuple[str | None, ...]) -> bool:
    """Whether `quantize_kernels` quantises the parameter at this dotted path, which has these logical axes."""
    *parents, last = path.split(".")
    return last == "kernel" and axes[0] == "layers" and not set(parents) & set(_NOT_QUANTIZED)


def quantize(kernel: Any, axes: tuple[str | None, ...], kind: QuantizedFormat) -> Quantized:
    """A kernel [L, ...] as blocks with scales, sharded like the kernel.

    Raises ValueError where a shard would hold a part of a block, or the size of the axis is odd.
    """
    axis = next(i for i in reversed(range(len(axes))) if axes[i] in _BLOCK_AXES)
    block = math.gcd(kernel.shape[axis], BLOCK)  # from the unsharded size, so that it is the same on any mesh
    sharding = kernel.sharding
    shard = sharding.shard_shape(kernel.shape)[axis]
    if shard % block:
        raise ValueError(
            f"model.quantize={kind}: a kernel {kernel.shape} of axes {axes} is split into shards of {shard} along "
            f"{axes[axis]!r}, not a multiple of the block size {block}; use fewer devices on that mesh axis"
        )
    if block % 2:
        raise ValueError(f"model.quantize={kind}: axis {axes[axis]!r} of a kernel {kernel.shape} has an odd size")
    run = functools.partial(_quantize, kind=kind, axis=axis - len(axes), block=block)
    if isinstance(kernel, jax.ShapeDtypeStruct):
        shapes = jax.eval_shape(run, kernel)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
    return jax.jit(run, out_shardings=sharding)(kernel)


def dense(kernel: Array | Quantized, dtype: Any) -> Float[Array, "..."]:
    """The kernel as an array in `dtype`, dequantised if it is quantised."""
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
def project_quantized(x: Float[Array, "..."], kernel: Quantized, rank: int) -> Float[Array, "..."]:
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


def _quantize(kernel: Array, *, kind: QuantizedFormat, axis: int, block: int) -> Quantized:
    at = kernel.ndim + axis
    blocks = _blocks(kernel.astype(jnp.float32), at, block)
    scales = jnp.abs(blocks).max(at + 1)
    normalised = blocks / jnp.expand_dims(jnp.where(scales == 0, 1, scales), at + 1)
    if kind == "nf4":
        nearest = jnp.searchsorted(jnp.asarray((_NF4[1:] + _NF4[:-1]) / 2), normalised).astype(jnp.uint8)
        first, second = jnp.split(nearest, 2, at + 1)
        codes = first | (second << 4)
    else:
        codes = jnp.round(normalised * 127).astype(jnp.int8)
    shape = (*kernel.shape[:at], -1, *kernel.shape[at + 1 :])
    return Quantized(codes.reshape(shape), scales, kind, axis)


def _blocks(x: Array, axis: int, block: int) -> Array:
    """[..., n * block, ...] -> [..., n, block, ...]."""
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
