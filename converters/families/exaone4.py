"""EXAONE 4: norms only after attention and the feed-forward layer, norms over the heads of q and k, and windows on
most layers of the large size, whose other layers have no rope."""

from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError
from converters.families.dense import BASE, QK_NORM, read_layer_types, read_sizes, write_layer_types, write_sizes
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope
from converters.weight_rows import Weight
from jaxtrain.nn.config import LayerKind, ModelConfig

ARCHITECTURE = "Exaone4ForCausalLM"
MODEL_TYPE = "exaone4"
WEIGHTS = (
    *(row for row in BASE if row.ours not in ("layers.input_norm.scale", "layers.mlp_norm.scale")),
    *QK_NORM,
    Weight("layers.attn_post_norm.scale", "model.layers.{layer}.post_attention_layernorm.weight"),
    Weight("layers.mlp_post_norm.scale", "model.layers.{layer}.post_feedforward_layernorm.weight"),
)

# transformers.Exaone4Config (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "layer_types": None,
}
INERT: dict[str, tuple[Any, ...]] = {"attention_bias": (None, False), "mlp_bias": (None, False)}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(hf, DEFAULTS, INERT)
    window = None if keys.get("sliding_window") is None else keys.size("sliding_window")
    # transformers reads the pattern only where layer_types is missing, and then as a number.
    every = 1 if window is None or keys.get("layer_types") is not None else keys.size("sliding_window_pattern")
    sliding = read_layer_types(keys, lambda layer: (layer + 1) % every != 0)
    if any(sliding) and window is None:
        raise ConversionError("config.json: layer_types holds sliding_attention, but there is no sliding_window")
    rope = read_rope(keys)
    full = LayerKind(None, rope if window is None else None)
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        pre_norms=False,
        post_norms=True,
        qk_norm="head",
        pattern=tuple(LayerKind(window, rope) if slides else full for slides in sliding),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    return {**write_sizes(config), **write_layer_types(config)}
