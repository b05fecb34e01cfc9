"""Qwen3, the dense sizes: norms over the heads of q and k, an independent head width, optional biases."""

from collections.abc import Mapping
from typing import Any

from converters.families.dense import (
    BASE,
    O_BIAS,
    QK_NORM,
    QKV_BIAS,
    read_sizes,
    read_windows,
    write_sizes,
    write_windows,
)
from converters.families.keys import ConfigKeys
from jaxtrain.nn.config import ModelConfig

ARCHITECTURE = "Qwen3ForCausalLM"
MODEL_TYPE = "qwen3"
WEIGHTS = (*BASE, *QKV_BIAS, *O_BIAS, *QK_NORM)

# transformers.Qwen3Config (5.23)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
INERT = {"mlp_bias": (None, False), "qk_norm": (None, True), "use_qk_norm": (None, True)}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(hf, DEFAULTS, INERT)
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        qkv_bias=keys.flag("attention_bias"),
        o_bias=keys.flag("attention_bias"),
        qk_norm="head",
        pattern=read_windows(keys),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        **write_windows(config),
        "attention_bias": config.qkv_bias,
    }
