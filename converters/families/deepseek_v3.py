"""DeepSeek-V3 and R1, Kimi-K2, Moonlight: latent attention, experts chosen by sigmoids, dense first layers."""

from collections.abc import Mapping
from typing import Any

from converters.families.dense import BASE, read_sizes, write_sizes
from converters.families.keys import ConfigKeys
from converters.families.latent import LATENT_ATTENTION, read_latent, read_latent_rope, write_latent
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
ARCHITECTURE = "DeepseekV3ForCausalLM"
MODEL_TYPE = "deepseek_v3"
WEIGHTS = (
    *(row for row in BASE if ".attn." not in row.ours),
    *(*LATENT_ATTENTION, *SIGMOID_EXPERTS),
)

# transformers.DeepseekV3Config (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(with_routed_experts(hf), DEFAULTS, INERT)
    rope = read_latent_rope(keys)
    return ModelConfig(
        family=MODEL_TYPE,
        **(read_sizes(keys) | read_latent(keys)),
        pattern=tuple(LayerKind(None, rope, dense) for dense in read_dense_first(keys)),
        moe=read_sigmoid_experts(keys),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    return {**write_sizes(config), **write_latent(config), **write_sigmoid_experts(config)}
