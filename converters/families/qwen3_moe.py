"""Qwen3's mixtures of experts: Qwen3 with experts in every layer or some, and one window for all layers or none."""

from collections.abc import Mapping
from typing import Any

from converters.families.dense import BASE, O_BIAS, QK_NORM, QKV_BIAS, read_sizes, write_sizes
from converters.families.experts import (
    DENSE_LAYERS,
    expert_rows,
    read_dense_layers,
    read_experts,
    router_rows,
    with_num_experts,
    write_dense_layers,
    write_experts,
)
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope
from jaxtrain.nn.config import LayerKind, ModelConfig

ARCHITECTURE = "Qwen3MoeForCausalLM"
MODEL_TYPE = "qwen3_moe"
WEIGHTS = (
    *(*BASE, *QKV_BIAS, *O_BIAS, *QK_NORM),
    *(*router_rows("mlp.gate"), *DENSE_LAYERS),
    *expert_rows("mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"),
)

# transformers.Qwen3MoeConfig (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}
INERT = {
    "mlp_bias": (None, False),
    "qk_norm": (None, True),
    "use_qk_norm": (None, True),
}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(with_num_experts(hf), DEFAULTS, INERT)
    used = keys.flag("use_sliding_window") and keys.get("sliding_window") is not None
    window, rope = keys.size("sliding_window") if used else None, read_rope(keys)
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        qkv_bias=keys.flag("attention_bias"),
        o_bias=keys.flag("attention_bias"),
        qk_norm="head",
        pattern=tuple(LayerKind(window, rope, dense) for dense in read_dense_layers(keys)),
        moe=read_experts(keys, renormalise=keys.flag("norm_topk_prob")),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    window = config.pattern[0].window
    return {
        **write_sizes(config),
        **write_dense_layers(config),
        "attention_bias": config.qkv_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        **write_experts(config),
        "norm_topk_prob": config.moe.renormalise,
    }
