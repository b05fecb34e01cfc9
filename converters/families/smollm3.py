"""SmolLM3: Llama without rope in some layers, every fourth by default."""

from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError
from converters.families.dense import (
    BASE,
    MLP_BIAS,
    O_BIAS,
    QKV_BIAS,
    read_layer_types,
    read_sizes,
    write_sizes,
    write_windows,
)
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope
from jaxtrain.nn.config import LayerKind, ModelConfig

ARCHITECTURE = "SmolLM3ForCausalLM"
MODEL_TYPE = "smollm3"
WEIGHTS = (*BASE, *QKV_BIAS, *O_BIAS, *MLP_BIAS)

# transformers.SmolLM3Config (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "rope_theta": 2000000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
}
INERT: dict[str, tuple[Any, ...]] = {}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(hf, DEFAULTS, INERT)
    layers, every = keys.size("num_hidden_layers"), keys.size("no_rope_layer_interval")
    rotates = keys.get("no_rope_layers")  # 1 where a layer has rope, in spite of the name
    if rotates is None:
        rotates = [(layer + 1) % every != 0 for layer in range(layers)]
    if not isinstance(rotates, list) or not all(each in (0, 1) for each in rotates):
        raise ConversionError(f"config.json: no_rope_layers must be a list of 0 and 1, not {rotates!r}")
    if len(rotates) < layers:
        raise ConversionError(f"config.json: no_rope_layers names {len(rotates)} of {layers} layers")
    used = keys.flag("use_sliding_window") and keys.get("sliding_window") is not None
    sliding, rope = read_layer_types(keys, lambda layer: used and not rotates[layer]), read_rope(keys)
    window = keys.size("sliding_window") if used else None
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        qkv_bias=keys.flag("attention_bias"),
        o_bias=keys.flag("attention_bias"),
        mlp_bias=keys.flag("mlp_bias"),
        pattern=tuple(
            LayerKind(window if slides else None, rope if rotated else None)
            for slides, rotated in zip(sliding, rotates[:layers], strict=True)  # it may name more layers
        ),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        **write_windows(config),
        "no_rope_layers": [int(kind.rope is not None) for kind in config.pattern],
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }
