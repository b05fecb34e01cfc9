"""Granite 3: Llama with multipliers of embeddings, residuals, attention and logits."""

from collections.abc import Mapping
from typing import Any

from converters.families.dense import BASE, MLP_BIAS, O_BIAS, QKV_BIAS, read_sizes, write_sizes
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope
from jaxtrain.nn.config import LayerKind, ModelConfig

ARCHITECTURE = "GraniteForCausalLM"
MODEL_TYPE = "granite"
WEIGHTS = (*BASE, *QKV_BIAS, *O_BIAS, *MLP_BIAS)

# transformers.GraniteConfig (5.24)
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
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}
INERT: dict[str, tuple[Any, ...]] = {}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(hf, DEFAULTS, INERT)
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        qkv_bias=keys.flag("attention_bias"),
        o_bias=keys.flag("attention_bias"),
        mlp_bias=keys.flag("mlp_bias"),
        embedding_scale=keys.number("embedding_multiplier"),
        residual_scale=keys.number("residual_multiplier"),
        attention_scale=keys.number("attention_multiplier"),
        logit_scale=1 / keys.number("logits_scaling"),
        pattern=(LayerKind(None, read_rope(keys)),) * keys.size("num_hidden_layers"),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.attention_scale,
        "logits_scaling": 1 / config.logit_scale,
    }
