"""Qwen2's mixtures of experts (Qwen1.5-MoE, Qwen2-57B-A14B): Qwen2 with experts beside a shared one with a gate."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.errors import ConversionError
from converters.families.dense import BASE, QKV_BIAS, read_sizes, read_windows, write_sizes, write_windows
from converters.families.experts import (
    DENSE_LAYERS,
    SHARED_EXPERT,
    expert_rows,
    read_dense_layers,
    read_experts,
    router_rows,
    with_num_experts,
    write_dense_layers,
    write_experts,
)
from converters.families.keys import ConfigKeys
from converters.weight_rows import Weight
from jaxtrain.nn.config import ModelConfig

ARCHITECTURE = "Qwen2MoeForCausalLM"
MODEL_TYPE = "qwen2_moe"
WEIGHTS: tuple[Weight, ...] = (
    *(*BASE, *QKV_BIAS, *router_rows("mlp.gate"), *SHARED_EXPERT, *DENSE_LAYERS),
    *expert_rows("mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"),
)

# transformers.Qwen2MoeConfig (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
    "qkv_bias": True,
}
INERT: dict[str, tuple[Any, ...]] = {"mlp_bias": (None, False), "attention_bias": (None, True)}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(with_num_experts(hf), DEFAULTS, INERT)
    if keys.flag("use_sliding_window") and keys.get("layer_types") is None:
        raise ConversionError(
            "config.json: use_sliding_window=True without layer_types is not supported by this family; name the layers "
            "with a window in layer_types"
        )
    dense = read_dense_layers(keys)
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        qkv_bias=keys.flag("qkv_bias"),
        pattern=tuple(replace(kind, dense=each) for kind, each in zip(read_windows(keys), dense, strict=True)),
        moe=read_experts(keys, renormalise=keys.flag("norm_topk_prob"), shared=True),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    return {
        **write_sizes(config),
        **write_windows(config),
        **write_dense_layers(config),
        **write_experts(config),
        "qkv_bias": config.qkv_bias,
        "norm_topk_prob": config.moe.renormalise,
    }
