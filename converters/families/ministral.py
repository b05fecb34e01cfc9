"""Ministral in transformers: Mistral with sliding windows on the layers that `layer_types` names."""

from collections.abc import Mapping
from typing import Any

from converters.families.dense import BASE, read_layer_types, read_sizes, write_layer_types, write_sizes
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope
from jaxtrain.nn.config import LayerKind, ModelConfig

ARCHITECTURE = "MinistralForCausalLM"
MODEL_TYPE = "ministral"
WEIGHTS = BASE

# transformers.MinistralConfig (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
    "layer_types": None,
}
INERT: dict[str, tuple[Any, ...]] = {"attention_bias": (None, False), "mlp_bias": (None, False)}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(hf, DEFAULTS, INERT)
    window = None if keys.get("sliding_window") is None else keys.size("sliding_window")
    sliding, rope = read_layer_types(keys, lambda layer: window is not None), read_rope(keys)
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        pattern=tuple(LayerKind(window if slides else None, rope) for slides in sliding),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        **write_layer_types(config),
    }
