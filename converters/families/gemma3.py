"""Gemma 3, the text models: Gemma 2 with norms of q and k, five windows to one full layer, a rope for each kind."""

from collections.abc import Mapping
from typing import Any

from converters.families.dense import (
    BASE,
    O_BIAS,
    QK_NORM,
    QKV_BIAS,
    read_layer_types,
    read_sizes,
    write_layer_types,
    write_sizes,
)
from converters.families.keys import ConfigKeys
from converters.families.rope import read_ropes, write_ropes
from converters.weight_rows import Weight
from jaxtrain.nn.config import LayerKind, ModelConfig

ARCHITECTURE = "Gemma3ForCausalLM"
MODEL_TYPE = "gemma3_text"
WEIGHTS = (
    *(row for row in BASE if row.ours != "layers.mlp_norm.scale"),
    *QKV_BIAS,
    *O_BIAS,
    *QK_NORM,
    Weight("layers.mlp_norm.scale", "model.layers.{layer}.pre_feedforward_layernorm.weight"),
    Weight("layers.attn_post_norm.scale", "model.layers.{layer}.post_attention_layernorm.weight"),
    Weight("layers.mlp_post_norm.scale", "model.layers.{layer}.post_feedforward_layernorm.weight"),
)

# transformers.Gemma3TextConfig (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": None,
    "rope_local_base_freq": 10000.0,
    "sliding_window_pattern": 6,
}
INERT: dict[str, tuple[Any, ...]] = {
    "use_bidirectional_attention": (None, False),
    "mlp_bias": (None, False),
    "attn_logit_softcapping": (None,),
}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(hf, DEFAULTS, INERT)
    ropes, every = read_ropes(keys, keys.get("rope_local_base_freq")), keys.size("sliding_window_pattern")
    sliding = read_layer_types(keys, lambda layer: (layer + 1) % every != 0)
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys, "hidden_activation"),
        qkv_bias=keys.flag("attention_bias"),
        o_bias=keys.flag("attention_bias"),
        post_norms=True,
        norm_offset=True,
        norm_in_float32=True,
        embedding_scale=keys.size("hidden_size") ** 0.5,
        attention_scale=keys.number("query_pre_attn_scalar") ** -0.5,
        logit_softcap=keys.number("final_logit_softcapping") if keys.get("final_logit_softcapping") else None,
        qk_norm="head",
        pattern=tuple(
            LayerKind(keys.size("sliding_window"), ropes["sliding_attention"])
            if slides
            else LayerKind(None, ropes["full_attention"])
            for slides in sliding
        ),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config, "hidden_activation"),
        **write_layer_types(config),
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": round(config.attention_scale**-2, 9) if config.attention_scale else config.head_dim,
        "final_logit_softcapping": config.logit_softcap,
        **write_ropes(config),
    }
