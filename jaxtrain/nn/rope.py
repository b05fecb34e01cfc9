"""Rotary position embedding (https://arxiv.org/abs/2104.09864), in the half-split layout of Hugging Face.

All rope types of transformers' `modeling_rope_utils`, with its formulas. Two of them, dynamic and longrope, depend on
the length of the sequence. transformers uses the longest sequence of the batch. Here each segment of a packed row has
its own length, so the log-probabilities of a document do not depend on the documents it is packed with, and equal those
of transformers for this document alone. Keys in a cache are rotated when they are written, so the length must stay the
same while a sequence grows: a sampler sets `Execution.rope_length` to the maximum length, as vLLM does. (transformers
uses the number of tokens so far, and mixes frequencies in one cache.) Sampler and trainer then agree for sequences
within the original length if `rope_length` is within it too, and for all sequences if the trainer has the same.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from jaxtrain.nn.config import (
    DynamicScaling,
    LayerKind,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Rope,
    YarnScaling,
)
from jaxtrain.types import Array


class RopeTable(NamedTuple):
    """Cosines and sines for the R channels that are rotated; R = H unless the rope is partial."""

    cos: Array  # [B, T, 1, R/2] float32
    sin: Array  # [B, T, 1, R/2] float32


def rope_tables(
    kinds: Mapping[LayerKind, int], positions: Integer[Array, "B T"], lengths: Integer[Array, "..."]
) -> tuple[RopeTable | None, ...]:
    """The table of each kind of layer, for positions [B, T] in sequences of `lengths`, which broadcast to them.

    `kinds` has the channels that a rope of share 1 turns in layers of each kind. Computed once per forward pass and
    shared by all layers of a kind and by kinds with the same rope and width.
    """
    widths = {(kind.rope, width) for kind, width in kinds.items() if kind.rope}
    tables = {(rope, width): rope_table(rope, width, positions, lengths) for rope, width in widths}
    return tuple(tables[kind.rope, width] if kind.rope else None for kind, width in kinds.items())


def rope_table(
    rope: Rope, head_dim: int, positions: Integer[Array, "B T"], lengths: Integer[Array, "..."]
) -> RopeTable:
    """Cosines and sines of positions [B, T]."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(rope, head_dim, lengths)
    factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling | LongRopeScaling) else 1.0
    return RopeTable(factor * jnp.cos(angles)[..., None, :], factor * jnp.sin(angles)[..., None, :])


def token_segment_lengths(
    positions: Integer[Array, "B T"], segment_ids: Integer[Array, "B T"]
) -> Integer[Array, "B T"]:
    """The length of the segment of each token of packed rows."""

    def row(positions: Array, segment_ids: Array) -> Array:
        last = jax.ops.segment_max(positions, segment_ids, num_segments=len(positions) + 1)
        return last[segment_ids] + 1

    return jax.vmap(row)(positions, segment_ids)


def frequencies(rope: Rope, head_dim: int, lengths: Integer[Array, "..."]) -> Float[Array, "..."]:
    """Radians per position of each pair of channels, float32: [R/2], or [*lengths, R/2] where they depend on it."""
    width = int(head_dim * rope.partial)
    exponents = np.arange(0, width, 2, dtype=np.float32) / width
    wavelengths = _power(rope.theta, exponents)  # in radians
    plain = 1 / wavelengths
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor):
            return plain / np.float32(factor)
        case ProportionalScaling(factor):
            rotated = int(rope.partial * head_dim // 2)
            inverse = 1 / _power(rope.theta, np.arange(0, 2 * rotated, 2, dtype=np.float32) / head_dim)
            return np.pad(inverse, (0, head_dim // 2 - rotated)) / np.float32(factor)
        case Llama3Scaling(factor, low_freq_factor, high_freq_factor, original):
            wavelength = 2 * math.pi / plain  # in positions
            # From 0, for long wavelengths, which are scaled, to 1, for short ones, which are kept.
            smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            smooth = np.clip(smooth, 0, 1)
            return ((1 - smooth) * plain / factor + smooth * plain).astype(np.float32)
        case YarnScaling() as yarn:
            keep = 1 - _yarn_ramp(yarn, rope.theta, width)
            return ((1 - keep) / (yarn.factor * wavelengths) + keep * plain).astype(np.float32)
        case LongRopeScaling(short, long, original):
            by_length = [1 / (wavelengths * np.asarray(factors, np.float32)) for factors in (short, long)]
            return jnp.where(lengths[..., None] > original, by_length[1], by_length[0])
        case DynamicScaling(factor, max_positions):
            beyond = factor * jnp.maximum(lengths, max_positions) / max_positions - (factor - 1)
            theta = rope.theta * beyond ** (width / (width - 2))
            return 1 / theta[..., None] ** exponents


def _power(theta: float, exponents: np.ndarray) -> np.ndarray:
    """In float64, then rounded: numpy's float32 power is wrong by one bit on some CPUs, 4e-5 radians at token 600."""
    return (theta ** exponents.astype(np.float64)).astype(np.float32)


def _yarn_ramp(yarn: YarnScaling, theta: float, width: int) -> np.ndarray:
    """From 0, for channels that are kept, to 1, for those that are interpolated: [R/2]."""

    def channel(rotations: float) -> float:
        """The channel with this many rotations over the original positions."""
        return width * math.log(yarn.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(yarn.beta_fast), channel(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)


def apply_rope(x: Float[Array, "B T heads H"], table: RopeTable | None) -> Float[Array, "B T heads H"]:
    """Rotate the first R channels by the positions of `table`, in float32; the result has x's dtype."""
    if table is None:
        return x
    width = 2 * table.cos.shape[-1]
    # Split before the cast: XLA for TPU would write the float32 of both halves to memory.
    first, second = (half.astype(jnp.float32) for half in jnp.split(x[..., :width], 2, -1))
    rotated = (first * table.cos - second * table.sin, second * table.cos + first * table.sin)
    return jnp.concatenate([*(part.astype(x.dtype) for part in rotated), x[..., width:]], -1)
