"""OLMoE: a mixture of experts in every layer, and norms over all heads of q and k together."""

from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError
from converters.families.dense import BASE, O_BIAS, QKV_BIAS, read_sizes, write_sizes
from converters.families.experts import expert_rows, router_rows
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope
from converters.weight_rows import Split, Weight
from jaxtrain.nn.config import LayerKind, ModelConfig, MoE

ARCHITECTURE = "OlmoeForCausalLM"
MODEL_TYPE = "olmoe"
WEIGHTS = (
    *(*BASE, *QKV_BIAS, *O_BIAS),
    Weight("layers.attn.q_norm.scale", "model.layers.{layer}.self_attn.q_norm.weight", (Split(0),)),
    Weight("layers.attn.k_norm.scale", "model.layers.{layer}.self_attn.k_norm.weight", (Split(0),)),
    *router_rows("mlp.gate"),
    *expert_rows("mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"),
)

# transformers.OlmoeConfig (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_experts_per_tok": 8,
    "num_experts": 64,
    "norm_topk_prob": False,
}
INERT: dict[str, tuple[Any, ...]] = {"mlp_bias": (None, False)}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    # transformers reads num_local_experts as another name of num_experts.
    keys = ConfigKeys({"num_experts" if key == "num_local_experts" else key: hf[key] for key in hf}, DEFAULTS, INERT)
    sizes = read_sizes(keys)
    width = sizes["hidden_size"] // sizes["num_heads"]
    if sizes["head_dim"] != width:  # the norms of transformers' attention have this width, whatever the key says
        raise ConversionError(f"config.json: head_dim={sizes['head_dim']} is not supported by this family; {width} is")
    return ModelConfig(
        family=MODEL_TYPE,
        **sizes,
        qkv_bias=keys.flag("attention_bias"),
        o_bias=keys.flag("attention_bias"),
        qk_norm="all",
        pattern=(LayerKind(None, read_rope(keys)),) * keys.size("num_hidden_layers"),
        moe=MoE(
            num_experts=keys.size("num_experts"),
            experts_per_token=keys.size("num_experts_per_tok"),
            intermediate_size=keys.size("intermediate_size"),
            renormalise=keys.flag("norm_topk_prob"),
        ),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None
    return {
        **write_sizes(config),
        "attention_bias": config.qkv_bias,
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.experts_per_token,
        "norm_topk_prob": config.moe.renormalise,
    }
