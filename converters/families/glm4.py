"""GLM-4 0414, the dense sizes (GLM-4, GLM-Z1): norms on both sides of a layer, gate and up in one matrix, and rope on
pairs of neighbouring channels in the first half of each head.

Here rope turns channels i and i + R/2, so the channels of q and k are reordered.
"""

from collections.abc import Mapping
from typing import Any

from converters.families.dense import BASE, FUSED_GATE_UP, QKV_BIAS, read_sizes, write_sizes
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope, rope_parameters
from converters.weight_rows import PairsToHalves, Split, Transpose, Weight
from jaxtrain.nn.config import LayerKind, ModelConfig, ProportionalScaling

ARCHITECTURE = "Glm4ForCausalLM"
MODEL_TYPE = "glm4"


def _pairs(config: ModelConfig) -> PairsToHalves:
    """For tensors whose axes 0 and 1 are heads and their channels."""
    rope = config.pattern[0].rope
    assert rope is not None
    share = (
        1.0 if isinstance(rope.scaling, ProportionalScaling) else rope.partial
    )  # that of a part has frequencies of 0
    return PairsToHalves(1, int(config.head_dim * share))


_ROTATED = (
    *(
        Weight(
            f"layers.attn.{name}.kernel",
            f"model.layers.{{layer}}.self_attn.{name}.weight",
            (Split(0), _pairs, Transpose((2, 0, 1))),
        )
        for name in ("q_proj", "k_proj")
    ),
    *(
        Weight(f"layers.attn.{name}.bias", f"model.layers.{{layer}}.self_attn.{name}.bias", (Split(0), _pairs))
        for name in ("q_proj", "k_proj")
    ),
)
_OWN = (*_ROTATED, *FUSED_GATE_UP)
WEIGHTS = (
    *(row for row in (*BASE, *QKV_BIAS) if row.ours not in {own.ours for own in _OWN}),
    *_OWN,
    Weight("layers.attn_post_norm.scale", "model.layers.{layer}.post_self_attn_layernorm.weight"),
    Weight("layers.mlp_post_norm.scale", "model.layers.{layer}.post_mlp_layernorm.weight"),
)

# transformers.Glm4Config (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 0.00000015625,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
INERT: dict[str, tuple[Any, ...]] = {"mlp_bias": (None, False), "rope_interleaved": (None, True)}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(hf, DEFAULTS, INERT)
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        qkv_bias=keys.flag("attention_bias"),
        post_norms=True,
        pattern=(LayerKind(None, read_rope(keys, partial=True)),) * keys.size("num_hidden_layers"),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    rope = config.pattern[0].rope
    assert rope is not None
    return {
        **write_sizes(config),
        "rope_parameters": {**rope_parameters(rope), "partial_rotary_factor": rope.partial},
        "attention_bias": config.qkv_bias,
    }
