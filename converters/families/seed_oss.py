"""Seed-OSS: Llama with separate switches for the biases of q, k, v and of the output, and an independent head width."""

from collections.abc import Mapping
from typing import Any

from converters.families.dense import BASE, MLP_BIAS, O_BIAS, QKV_BIAS, read_sizes, write_sizes
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope
from jaxtrain.nn.config import LayerKind, ModelConfig

ARCHITECTURE = "SeedOssForCausalLM"
MODEL_TYPE = "seed_oss"
WEIGHTS = (*BASE, *QKV_BIAS, *O_BIAS, *MLP_BIAS)

# transformers.SeedOssConfig (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 155136,
    "hidden_size": 4096,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 524288,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "attention_out_bias": False,
    "mlp_bias": False,
}
INERT: dict[str, tuple[Any, ...]] = {}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(hf, DEFAULTS, INERT)
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        qkv_bias=keys.flag("attention_bias"),
        o_bias=keys.flag("attention_out_bias"),
        mlp_bias=keys.flag("mlp_bias"),
        pattern=(LayerKind(None, read_rope(keys)),) * keys.size("num_hidden_layers"),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        "attention_bias": config.qkv_bias,
        "attention_out_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
    }
