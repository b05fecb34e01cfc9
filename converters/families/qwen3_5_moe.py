"""Qwen3.5's mixtures of experts, the text model: Qwen3.5 with experts beside a shared one in every layer."""

from collections.abc import Mapping
from typing import Any

from converters.families import hybrid, qwen3_5
from converters.families.dense import read_sizes, write_sizes
from converters.families.experts import (
    FUSED_EXPERTS,
    SHARED_EXPERT,
    expert_rows,
    read_experts,
    router_rows,
    with_num_experts,
    write_experts,
)
from converters.families.keys import ConfigKeys
from jaxtrain.nn.config import ModelConfig

ARCHITECTURE = "Qwen3_5MoeForCausalLM"
MODEL_TYPE = "qwen3_5_moe_text"
WEIGHTS = (
    *(*qwen3_5.WEIGHTS, *router_rows("mlp.gate"), *SHARED_EXPERT),
    *(*expert_rows("mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"), *FUSED_EXPERTS),
)

# transformers.Qwen3_5MoeTextConfig (5.24)
DEFAULTS: dict[str, Any] = {
    **hybrid.DEFAULTS,
    "vocab_size": 248320,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}
INERT = qwen3_5.INERT


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    named = qwen3_5.with_text_rope(with_num_experts(hf))
    keys = ConfigKeys(named, DEFAULTS, INERT)
    moe = read_experts(keys, renormalise=True, shared=True)
    # No layer has the width of a dense one, and transformers has no default for it.
    sizes = read_sizes(ConfigKeys({"intermediate_size": moe.intermediate_size, **named}, DEFAULTS, INERT))
    return ModelConfig(
        family=MODEL_TYPE,
        **sizes,
        **hybrid.read_hybrid(keys),
        moe=moe,
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    return {**write_sizes(config), **hybrid.write_hybrid(config), **write_experts(config)}
