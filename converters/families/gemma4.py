"""Gemma 4, the text models: Gemma 3 with wider heads and values that are keys in the layers without a window, and, by
size, an input of every layer, layers that reuse keys and values, or a mixture of experts beside the dense layer."""

from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError
from converters.families.dense import (
    BASE,
    HEADS_IN,
    HEADS_OUT,
    MATRIX,
    read_layer_types,
    read_sizes,
    write_layer_types,
    write_sizes,
)
from converters.families.experts import DENSE_LAYERS, fused_experts
from converters.families.global_layers import read_global_sizes, read_reuse, write_global_sizes
from converters.families.keys import ConfigKeys
from converters.families.rope import read_ropes, write_ropes
from converters.weight_rows import PadVocab, Split, Weight
from jaxtrain.nn.config import GlobalAttention, LayerKind, ModelConfig, MoE

ARCHITECTURE = "Gemma4ForCausalLM"
MODEL_TYPE = "gemma4_text"
_LAYER = "model.layers.{layer}"
_NORMS = {
    "mlp_norm": "pre_feedforward_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
    "dense_mlp_post_norm": "post_feedforward_layernorm_1",
    "mlp.norm": "pre_feedforward_layernorm_2",
    "mlp.post_norm": "post_feedforward_layernorm_2",
    "per_layer.norm": "post_per_layer_input_norm",
}
_PARTS = ("attn", "global_attn", "reusing_attn", "reusing_global_attn")


def _attention(part: str) -> tuple[Weight, ...]:
    ours, theirs = f"layers.{part}", f"{_LAYER}.self_attn"
    return (
        *(Weight(f"{ours}.{each}_proj.kernel", f"{theirs}.{each}_proj.weight", HEADS_OUT) for each in "qkv"),
        *(Weight(f"{ours}.{each}_proj.bias", f"{theirs}.{each}_proj.bias", (Split(0),)) for each in "qkv"),
        Weight(f"{ours}.o_proj.kernel", f"{theirs}.o_proj.weight", HEADS_IN),
        Weight(f"{ours}.o_proj.bias", f"{theirs}.o_proj.bias"),
        *(Weight(f"{ours}.{each}_norm.scale", f"{theirs}.{each}_norm.weight") for each in "qk"),
    )


WEIGHTS = (
    *(row for row in BASE if ".attn." not in row.ours and row.ours != "layers.mlp_norm.scale"),
    *(row for part in _PARTS for row in _attention(part)),
    *(Weight(f"layers.{ours}.scale", f"{_LAYER}.{theirs}.weight") for ours, theirs in _NORMS.items()),
    *DENSE_LAYERS,
    *(
        Weight(f"layers.wide_mlp.{name}.kernel", f"{_LAYER}.mlp.{name}.weight", MATRIX)
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
    Weight("layers.mlp.router.kernel", f"{_LAYER}.router.proj.weight", MATRIX),
    Weight("layers.mlp.scales.input", f"{_LAYER}.router.scale"),
    Weight("layers.mlp.scales.experts", f"{_LAYER}.router.per_expert_scale"),
    *fused_experts("experts"),
    Weight("layers.per_layer.gate_proj.kernel", f"{_LAYER}.per_layer_input_gate.weight", MATRIX),
    Weight("layers.per_layer.out_proj.kernel", f"{_LAYER}.per_layer_projection.weight", MATRIX),
    Weight("layers.scale", f"{_LAYER}.layer_scalar"),
    Weight("per_layer.weight", "model.embed_tokens_per_layer.weight", (PadVocab(0), Split(1))),
    Weight("per_layer.proj.kernel", "model.per_layer_model_projection.weight", HEADS_OUT),
    Weight("per_layer.norm.scale", "model.per_layer_projection_norm.weight"),
)

# transformers.Gemma4TextConfig (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
    "rope_parameters": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "sliding_window": 512,
    "layer_types": None,
    "final_logit_softcapping": None,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "per_layer_config": None,
}
INERT: dict[str, tuple[Any, ...]] = {
    "use_bidirectional_attention": ("vision", None),  # tokens of images see each other; those of text do not
    "rope_theta": (None,),
    "rope_scaling": (None,),
    "mlp_bias": (None, False),
}
_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    given = ConfigKeys(hf, DEFAULTS, INERT)
    keys = ConfigKeys({**hf, "rope_parameters": given.section("rope_parameters") or _ROPES}, DEFAULTS, INERT)
    ropes = read_ropes(keys, None)
    # transformers makes the last layer one of full attention, whatever layer_types says.
    sliding = (*read_layer_types(keys, lambda layer: (layer + 1) % 6 != 0)[:-1], False)
    reused = read_reuse(keys, sliding)
    experts, wide = keys.flag("enable_moe_block"), keys.flag("use_double_wide_mlp")
    if experts and wide and any(reused):
        raise ConversionError("config.json: use_double_wide_mlp=True with enable_moe_block=True is not supported")
    kv_heads, width = read_global_sizes(keys, sliding)
    softcap, inputs = keys.get("final_logit_softcapping"), keys.get("hidden_size_per_layer_input") or None
    if inputs and keys.size("vocab_size_per_layer_input") != keys.size("vocab_size"):
        raise ConversionError(
            f"config.json: vocab_size_per_layer_input={keys.get('vocab_size_per_layer_input')} is not supported beside "
            f"vocab_size={keys.get('vocab_size')}; only the same size is"
        )

    def kind(layer: int) -> LayerKind:
        name = "sliding_attention" if sliding[layer] else "full_attention"
        return LayerKind(
            keys.size("sliding_window") if sliding[layer] else None,
            ropes[name],
            mixer="attention" if sliding[layer] else "global",
            reuses=reused[layer],
            beside=experts,
            wide=wide and reused[layer],
        )

    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys, "hidden_activation"),
        pattern=tuple(map(kind, range(keys.size("num_hidden_layers")))),
        global_attention=GlobalAttention(kv_heads, width, keys.flag("attention_k_eq_v")),
        qkv_bias=keys.flag("attention_bias"),
        o_bias=keys.flag("attention_bias"),
        post_norms=True,
        norm_in_float32=True,
        qk_norm="head",
        v_norm=True,
        attention_scale=1.0,
        embedding_scale=keys.size("hidden_size") ** 0.5,
        logit_softcap=None if softcap is None else keys.number("final_logit_softcapping"),
        per_layer_width=None if inputs is None else keys.size("hidden_size_per_layer_input"),
        layer_scale=True,
        moe=MoE(
            num_experts=keys.size("num_experts"),
            experts_per_token=keys.size("top_k_experts"),
            intermediate_size=keys.size("moe_intermediate_size"),
            renormalise=True,
            normed=True,
        )
        if experts
        else None,
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    return {
        **write_sizes(config, "hidden_activation"),
        **write_layer_types(config),
        **write_ropes(config),
        **write_global_sizes(config),
        "attention_bias": config.qkv_bias,
        "final_logit_softcapping": config.logit_softcap,
        "hidden_size_per_layer_input": config.per_layer_width or 0,
        "vocab_size_per_layer_input": config.vocab_size,
        "num_kv_shared_layers": sum(kind.reuses for kind in config.pattern),
        "use_double_wide_mlp": any(kind.wide for kind in config.pattern),
        "enable_moe_block": moe is not None,
        "num_experts": moe and moe.num_experts,
        "top_k_experts": moe and moe.experts_per_token,
        "moe_intermediate_size": moe and moe.intermediate_size,
    }
