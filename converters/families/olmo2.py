"""OLMo 2: norms after the layers instead of before, and over all heads of q and k together."""

from collections.abc import Mapping
from typing import Any

from converters.families.dense import BASE, O_BIAS, QKV_BIAS, read_sizes, write_sizes
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope
from converters.weight_rows import Split, Weight
from jaxtrain.nn.config import LayerKind, ModelConfig

ARCHITECTURE = "Olmo2ForCausalLM"
MODEL_TYPE = "olmo2"
WEIGHTS = (
    *(row for row in BASE if row.ours not in ("layers.input_norm.scale", "layers.mlp_norm.scale")),
    *QKV_BIAS,
    *O_BIAS,
    Weight("layers.attn.q_norm.scale", "model.layers.{layer}.self_attn.q_norm.weight", (Split(0),)),
    Weight("layers.attn.k_norm.scale", "model.layers.{layer}.self_attn.k_norm.weight", (Split(0),)),
    Weight("layers.attn_post_norm.scale", "model.layers.{layer}.post_attention_layernorm.weight"),
    Weight("layers.mlp_post_norm.scale", "model.layers.{layer}.post_feedforward_layernorm.weight"),
)

# transformers.Olmo2Config (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
INERT: dict[str, tuple[Any, ...]] = {"mlp_bias": (None, False)}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(hf, DEFAULTS, INERT)
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        qkv_bias=keys.flag("attention_bias"),
        o_bias=keys.flag("attention_bias"),
        pre_norms=False,
        post_norms=True,
        norm_in_float32=True,
        qk_norm="all",
        pattern=(LayerKind(None, read_rope(keys)),) * keys.size("num_hidden_layers"),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        "attention_bias": config.qkv_bias,
    }
