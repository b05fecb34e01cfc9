"""Llama 1 to 3.3 and everything saved as LlamaForCausalLM (SmolLM, Yi, TinyLlama ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.families.dense import BASE, MLP_BIAS, O_BIAS, QKV_BIAS, overlay, read_sizes, write_sizes
from converters.families.keys import Keys
from converters.families.rope import read_rope
from jaxtrain.nn.config import LayerKind, ModelConfig

ARCHITECTURE = "LlamaForCausalLM"
MODEL_TYPE = "llama"
WEIGHTS = (*BASE, *QKV_BIAS, *O_BIAS, *MLP_BIAS)

# transformers.LlamaConfig (5.23)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
INERT: dict[str, tuple[Any, ...]] = {}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises CheckpointError naming a key that is not supported."""
    keys = Keys(hf, DEFAULTS, INERT)
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        qkv_bias=keys.flag("attention_bias"),
        o_bias=keys.flag("attention_bias"),
        mlp_bias=keys.flag("mlp_bias"),
        pattern=(LayerKind(None, read_rope(keys)),) * keys.size("num_hidden_layers"),
        vocab_multiple=vocab_multiple,
    )


def to_hf(config: ModelConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Ours to config.json: `base` with the changes. Raises CheckpointError for what config.json cannot express."""
    return overlay(config, base, from_hf, _keys)


def _keys(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **write_sizes(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }
