"""Mixtral: Mistral with experts in every layer."""

from collections.abc import Mapping
from typing import Any

from converters.families.dense import BASE, read_sizes, write_sizes
from converters.families.experts import expert_rows, router_rows
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope
from jaxtrain.nn.config import LayerKind, ModelConfig, MoE

ARCHITECTURE = "MixtralForCausalLM"
MODEL_TYPE = "mixtral"
WEIGHTS = (
    *BASE,
    *router_rows("block_sparse_moe.gate"),
    *expert_rows("block_sparse_moe.experts", gate="w1", up="w3", down="w2"),
)

# transformers.MixtralConfig (5.24)
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
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
INERT = {"attention_bias": (None, False), "mlp_bias": (None, False), "router_jitter_noise": (None, 0.0)}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(hf, DEFAULTS, INERT)
    window = None if keys.get("sliding_window") is None else keys.size("sliding_window")
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        pattern=(LayerKind(window, read_rope(keys)),) * keys.size("num_hidden_layers"),
        moe=MoE(
            num_experts=keys.size("num_local_experts"),
            experts_per_token=keys.size("num_experts_per_tok"),
            intermediate_size=keys.size("intermediate_size"),
            renormalise=True,
        ),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    return {
        **write_sizes(config),
        "sliding_window": config.pattern[0].window,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.experts_per_token,
    }
