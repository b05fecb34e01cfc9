"""Common parts of decoders with gated delta nets between layers of gated attention (Qwen3-Next, Qwen3.5)."""

from typing import Any

from converters.errors import ConversionError
from converters.families.dense import HEADS_IN, HEADS_OUT, MATRIX
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope
from converters.weight_rows import Drop, SideBySide, Split, Weight
from jaxtrain.nn.config import DeltaNet, LayerKind, ModelConfig

_LAYER = "model.layers.{layer}"
_DELTA = f"{_LAYER}.linear_attn"

# transformers.Qwen3NextConfig and Qwen3_5TextConfig (5.24), as far as they agree
DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "layer_types": None,
    "full_attention_interval": 4,
}


def delta_sizes(config: ModelConfig) -> DeltaNet:
    assert config.delta is not None
    return config.delta


def convolved_sizes(config: ModelConfig) -> tuple[int, int, int]:
    """Channels of queries, keys and values."""
    sizes = delta_sizes(config)
    keys = sizes.key_heads * sizes.key_width
    return keys, keys, sizes.value_heads * sizes.value_width


def _query_or_gate(place: int) -> SideBySide:
    """Of each head the query, and then the gate."""
    return SideBySide(0, place, lambda config: (config.head_dim, config.head_dim), lambda config: config.num_heads)


GATED_ATTENTION = (
    Weight("layers.attn.q_proj.kernel", f"{_LAYER}.self_attn.q_proj.weight", HEADS_OUT, part=_query_or_gate(0)),
    Weight("layers.attn.gate_proj.kernel", f"{_LAYER}.self_attn.q_proj.weight", HEADS_OUT, part=_query_or_gate(1)),
    Weight("layers.attn.q_proj.bias", f"{_LAYER}.self_attn.q_proj.bias", (Split(0),), part=_query_or_gate(0)),
    Weight("layers.attn.gate_proj.bias", f"{_LAYER}.self_attn.q_proj.bias", (Split(0),), part=_query_or_gate(1)),
)
"""In the place of the rows of queries."""

DELTA = (
    *(
        Weight(
            f"layers.delta.{name}_conv",
            f"{_DELTA}.conv1d.weight",
            (Drop(1, 1), Split(0)),
            part=SideBySide(0, place, convolved_sizes),
        )
        for place, name in enumerate("qkv")
    ),
    Weight("layers.delta.rate", f"{_DELTA}.A_log"),
    Weight("layers.delta.bias", f"{_DELTA}.dt_bias"),
    Weight("layers.delta.norm.scale", f"{_DELTA}.norm.weight"),
    Weight("layers.delta.o_proj.kernel", f"{_DELTA}.out_proj.weight", HEADS_IN),
)
"""What Qwen3-Next and Qwen3.5 store in the same way: all but the projections of the input."""

SEPARATE_PROJECTIONS = (
    *(
        Weight(
            f"layers.delta.{name}_proj.kernel",
            f"{_DELTA}.in_proj_qkv.weight",
            HEADS_OUT,
            part=SideBySide(0, place, convolved_sizes),
        )
        for place, name in enumerate("qkv")
    ),
    Weight("layers.delta.gate_proj.kernel", f"{_DELTA}.in_proj_z.weight", HEADS_OUT),
    Weight("layers.delta.beta_proj.kernel", f"{_DELTA}.in_proj_b.weight", MATRIX),
    Weight("layers.delta.decay_proj.kernel", f"{_DELTA}.in_proj_a.weight", MATRIX),
)
"""Of Qwen3.5."""


def read_hybrid(keys: ConfigKeys) -> dict[str, Any]:
    """The fields of ModelConfig that describe attention and delta nets; `pattern` has no dense layers."""
    rope, layers = read_rope(keys, partial=True), keys.size("num_hidden_layers")
    types, every = keys.get("layer_types"), keys.size("full_attention_interval")
    if types is None:
        types = ["linear_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]
    else:
        types = keys.names("layer_types")
    if len(types) != layers:
        raise ConversionError(f"config.json: layer_types names {len(types)} layers, num_hidden_layers is {layers}")
    kinds = {"full_attention": LayerKind(None, rope), "linear_attention": LayerKind(None, None, mixer="delta")}
    if strange := set(types) - kinds.keys():
        raise ConversionError(f"config.json: layer_types holds {min(strange)!r}, which this family does not support")
    heads, value_heads = keys.size("linear_num_key_heads"), keys.size("linear_num_value_heads")
    if value_heads % heads:
        raise ConversionError(
            f"config.json: linear_num_value_heads={value_heads} is not a multiple of linear_num_key_heads={heads}"
        )
    return {
        "qkv_bias": keys.flag("attention_bias"),
        "o_bias": keys.flag("attention_bias"),
        "qk_norm": "head",
        "norm_offset": True,
        "norm_in_float32": True,
        "attention_gate": True,
        "pattern": tuple(kinds[each] for each in types),
        "delta": DeltaNet(
            key_heads=heads,
            value_heads=value_heads,
            key_width=keys.size("linear_key_head_dim"),
            value_width=keys.size("linear_value_head_dim"),
            conv_width=keys.size("linear_conv_kernel_dim"),
        ),
    }


def write_hybrid(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_hybrid`, without the rope."""
    sizes = delta_sizes(config)
    return {
        "attention_bias": config.qkv_bias,
        "layer_types": [
            "full_attention" if each.mixer == "attention" else "linear_attention" for each in config.pattern
        ],
        "linear_num_key_heads": sizes.key_heads,
        "linear_num_value_heads": sizes.value_heads,
        "linear_key_head_dim": sizes.key_width,
        "linear_value_head_dim": sizes.value_width,
        "linear_conv_kernel_dim": sizes.conv_width,
    }
