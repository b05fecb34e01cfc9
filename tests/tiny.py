"""Tiny random models and packed batches for the tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtrain.nn.block import Execution
from jaxtrain.nn.config import DeltaNet, LayerKind, Lora, ModelConfig, MoE, Rope
from jaxtrain.nn.model import Model
from jaxtrain.types import Batch

KIND = LayerKind(window=None, rope=Rope(theta=10_000.0))
CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=101,  # no multiple of 64: the padded rows must be inert
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-6,
    activation="silu",
    tied=True,
    qkv_bias=True,
    qk_norm="head",
    init_std=0.1,
    pattern=(KIND,) * 3,
)
MOE = MoE(num_experts=8, experts_per_token=2, intermediate_size=48, renormalise=True)
DELTA = DeltaNet(key_heads=2, value_heads=6, key_width=8, value_width=12, conv_width=3)
DELTA_KIND = LayerKind(window=None, rope=None, mixer="delta")
LORA = Lora(rank=4, alpha=8.0, dropout=0.0, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))

HF_CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
"""The config.json of a model, for `ModelSection.config`."""


def model(
    lora: Lora | None = None, mesh: jax.sharding.Mesh | None = None, remat: str = "none", **changes: Any
) -> Model:
    return Model(replace(CONFIG, **changes), lora, Execution(jnp.dtype("float32"), remat, "auto", mesh))


def build(module: type, *args: Any, **options: Any) -> Any:
    """A module of `nn` alone, off any mesh."""
    with nnx.use_eager_sharding(False):
        return module(*args, dtype=jnp.dtype("float32"), **options)


def random_params(of: Model, seed: int = 0) -> dict[str, Any]:
    """Random everywhere: a norm of ones, a bias or an adapter of zeros would hide a mistake."""
    leaves, tree = jax.tree.flatten(of.init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, noisy)
    real = jnp.arange(of.config.padded_vocab)[:, None] < of.config.vocab_size
    params["embed"]["weight"] = jnp.where(real, params["embed"]["weight"], 0)
    if "lm_head" in params:
        params["lm_head"]["kernel"] = jnp.where(real.T, params["lm_head"]["kernel"], 0)
    return params


def packed_batch(lengths: list[list[int]], length: int, seed: int = 0, vocab_size: int = CONFIG.vocab_size) -> Batch:
    """One row per list, one random segment per length; about two tokens in three carry weight, a first one never."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), length)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    weights = np.zeros(shape, np.float32)
    for row, segment_lengths in enumerate(lengths):
        start = 0
        for number, size in enumerate(segment_lengths, 1):
            span = slice(start, start + size)
            tokens[row, span] = rng.integers(0, vocab_size, size)
            positions[row, span] = np.arange(size)
            segments[row, span] = number
            weights[row, span] = rng.random(size) < 0.66
            weights[row, start] = 0
            start += size
        assert start <= length
    return Batch(tokens, positions, segments, weights)
