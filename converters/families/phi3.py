"""Phi-3 (mini, medium) and Phi-4 (14B, mini): q, k and v in one matrix, gate and up in another, LongRoPE beyond 4k."""

from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError
from converters.families.dense import BASE, FUSED_GATE_UP, read_sizes, write_sizes
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope, rope_parameters
from converters.weight_rows import SideBySide, Split, Transpose, Weight
from jaxtrain.nn.config import LayerKind, LongRopeScaling, ModelConfig

ARCHITECTURE = "Phi3ForCausalLM"
MODEL_TYPE = "phi3"
_QKV = "model.layers.{layer}.self_attn.qkv_proj.weight"  # [(N + 2K)*H, D]


def _heads(config: ModelConfig) -> tuple[int, ...]:
    return tuple(heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads))


_FUSED = (
    *(
        Weight(f"layers.attn.{ours}.kernel", _QKV, (Split(0), Transpose((2, 0, 1))), part=SideBySide(0, i, _heads))
        for i, ours in enumerate(("q_proj", "k_proj", "v_proj"))
    ),
    *FUSED_GATE_UP,
)
WEIGHTS = (*(row for row in BASE if row.ours not in {fused.ours for fused in _FUSED}), *_FUSED)

# transformers.Phi3Config (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
INERT: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "lm_head_bias": (None, False),
    "resid_pdrop": (None, 0.0),
    "embd_pdrop": (None, 0.0),
}
_OLD_NAMES = ("su", "yarn")  # names of longrope in the first checkpoints; transformers accepts both


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(_renamed(hf), DEFAULTS, INERT)
    window = None if keys.get("sliding_window") is None else keys.size("sliding_window")
    rope = read_rope(keys, partial=True)
    if rope.scaling is not None and not isinstance(rope.scaling, LongRopeScaling):
        kind = rope_parameters(rope)["rope_type"]
        raise ConversionError(
            f"config.json: rope_type={kind!r} is not supported by this family; known: default, longrope"
        )
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        pattern=(LayerKind(window, rope),) * keys.size("num_hidden_layers"),
        vocab_multiple=vocab_multiple,
    )


def _renamed(hf: Mapping[str, Any]) -> dict[str, Any]:
    """With the current name of the rope type in `rope_scaling` and `rope_parameters`."""
    renamed = dict(hf)
    for name in ("rope_scaling", "rope_parameters"):
        rope = hf.get(name)
        if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) in _OLD_NAMES:
            renamed[name] = {**rope, "rope_type": "longrope"}
    return renamed


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    rope = config.pattern[0].rope
    long = rope.scaling if rope and isinstance(rope.scaling, LongRopeScaling) else None
    return {
        **write_sizes(config),
        "sliding_window": config.pattern[0].window,
        # transformers reads it only here: its default is 4096, whatever rope_parameters hold
        **({"original_max_position_embeddings": long.original_max_positions} if long else {}),
    }
