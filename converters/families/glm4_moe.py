"""GLM-4.5 to GLM-4.7: experts chosen by sigmoids beside shared ones, dense first layers, rope in half of each head."""

from collections.abc import Mapping
from typing import Any

from converters.families.dense import BASE, QK_NORM, QKV_BIAS, read_sizes, write_sizes
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope, rope_parameters
from converters.families.sigmoid_experts import (
    INERT,
    SIGMOID_EXPERTS,
    read_dense_first,
    read_sigmoid_experts,
    with_routed_experts,
    write_sigmoid_experts,
)
from jaxtrain.nn.config import LayerKind, ModelConfig

__all__ = ["INERT"]
ARCHITECTURE = "Glm4MoeForCausalLM"
MODEL_TYPE = "glm4_moe"
WEIGHTS = (*BASE, *QKV_BIAS, *QK_NORM, *SIGMOID_EXPERTS)

# transformers.Glm4MoeConfig (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "use_qk_norm": False,
}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(with_routed_experts(hf), DEFAULTS, INERT)
    rope = read_rope(keys, partial=True)
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        qkv_bias=keys.flag("attention_bias"),
        qk_norm="head" if keys.flag("use_qk_norm") else None,
        pattern=tuple(LayerKind(None, rope, dense) for dense in read_dense_first(keys)),
        moe=read_sigmoid_experts(keys),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    rope = config.pattern[0].rope
    assert rope is not None
    return {
        **write_sizes(config),
        "rope_parameters": {**rope_parameters(rope), "partial_rotary_factor": rope.partial},
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_norm is not None,
        **write_sigmoid_experts(config),
    }
