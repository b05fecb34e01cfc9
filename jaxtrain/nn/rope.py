"""Rotary position embedding (https://arxiv.org/abs/2104.09864), in the half-split layout of Hugging Face."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtrain.nn.config import LinearScaling, Llama3Scaling, Rope
from jaxtrain.types import Array


class RopeTable(NamedTuple):
    cos: Array  # [B, T, 1, H/2] float32
    sin: Array  # [B, T, 1, H/2] float32


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of channels, [H/2] float32. Follows transformers' `modeling_rope_utils`."""
    inv_freq = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    match rope.scaling:
        case None:
            scaled = inv_freq
        case LinearScaling(factor):
            scaled = inv_freq / factor
        case Llama3Scaling(factor, low_freq_factor, high_freq_factor, original):
            wavelength = 2 * math.pi / inv_freq
            # 0 where a full turn is longer than the trained context allows (scale it), 1 where it is short (keep it).
            smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            smooth = np.clip(smooth, 0, 1)
            scaled = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    return scaled.astype(np.float32)


def rope_table(rope: Rope, head_dim: int, positions: Array) -> RopeTable:
    """Cosines and sines of positions [B, T]; made once per forward pass and shared by all layers."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies(rope, head_dim)
    return RopeTable(jnp.cos(angles), jnp.sin(angles))


def apply_rope(x: Array, table: RopeTable) -> Array:
    """Rotate x [B, T, heads, H] by its positions, in float32; returns x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    rotated = (first * table.cos - second * table.sin, second * table.cos + first * table.sin)
    return jnp.concatenate(rotated, -1).astype(x.dtype)
