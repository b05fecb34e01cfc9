"""GPT-OSS: experts with biases and a clamped SwiGLU, attention sinks, windows on every other layer, YaRN.

It is published in MXFP4 and read as bfloat16 (`converters.mxfp4`); exports are bfloat16 or float32.
"""

from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError
from converters.families.dense import (
    BASE,
    O_BIAS,
    QKV_BIAS,
    read_layer_types,
    read_sizes,
    write_layer_types,
    write_sizes,
)
from converters.families.experts import router_rows
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope
from converters.weight_rows import Interleaved, Weight
from jaxtrain.nn.config import ClampedSwiGLU, LayerKind, ModelConfig, MoE

ARCHITECTURE = "GptOssForCausalLM"
MODEL_TYPE = "gpt_oss"
_EXPERTS = "model.layers.{layer}.mlp.experts"
WEIGHTS = (
    *(*BASE, *QKV_BIAS, *O_BIAS),
    Weight("layers.attn.sinks", "model.layers.{layer}.self_attn.sinks"),
    *router_rows("mlp.router"),
    Weight("layers.mlp.experts.gate_proj.kernel", f"{_EXPERTS}.gate_up_proj", part=Interleaved(2, 0, 2)),
    Weight("layers.mlp.experts.up_proj.kernel", f"{_EXPERTS}.gate_up_proj", part=Interleaved(2, 1, 2)),
    Weight("layers.mlp.experts.down_proj.kernel", f"{_EXPERTS}.down_proj"),
    Weight("layers.mlp.experts.gate_proj.bias", f"{_EXPERTS}.gate_up_proj_bias", part=Interleaved(1, 0, 2)),
    Weight("layers.mlp.experts.up_proj.bias", f"{_EXPERTS}.gate_up_proj_bias", part=Interleaved(1, 1, 2)),
    Weight("layers.mlp.experts.down_proj.bias", f"{_EXPERTS}.down_proj_bias"),
)

# transformers.GptOssConfig (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "sliding_window": 128,
    "layer_types": None,
    "num_experts_per_tok": 4,
    "num_local_experts": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
INERT = {"mlp_bias": (None, True)}
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    quantized = hf.get("quantization_config") or {}
    if not isinstance(quantized, Mapping) or quantized.get("quant_method", "mxfp4") != "mxfp4":
        raise ConversionError(
            f"config.json: quantization_config={quantized!r} is not supported; only quant_method mxfp4 is"
        )
    rope = {} if any(hf.get(key) for key in ("rope_scaling", "rope_parameters")) else {"rope_parameters": _ROPE}
    dense = {key: value for key, value in hf.items() if key != "quantization_config"}
    keys = ConfigKeys({**dense, **rope}, DEFAULTS, INERT)
    sliding = read_layer_types(keys, lambda layer: layer % 2 == 0)
    window = keys.size("sliding_window") if any(sliding) else None
    turned = read_rope(keys)
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        qkv_bias=keys.flag("attention_bias"),
        o_bias=keys.flag("attention_bias"),
        norm_in_float32=True,
        sinks=True,
        pattern=tuple(LayerKind(window if slides else None, turned) for slides in sliding),
        moe=MoE(
            num_experts=keys.size("num_local_experts"),
            experts_per_token=keys.size("num_experts_per_tok"),
            intermediate_size=keys.size("intermediate_size"),
            renormalise=True,
            bias=True,
            swiglu=ClampedSwiGLU(keys.number("swiglu_alpha"), keys.number("swiglu_limit")),
        ),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    assert config.moe is not None and config.moe.swiglu is not None
    return {
        **write_sizes(config),
        **write_layer_types(config),
        "attention_bias": config.qkv_bias,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.experts_per_token,
        "swiglu_alpha": config.moe.swiglu.alpha,
        "swiglu_limit": config.moe.swiglu.limit,
    }
