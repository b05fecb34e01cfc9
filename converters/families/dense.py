"""Common parts of dense decoders (Llama, Qwen2, Qwen3): tensor names, config keys, layer windows.

The files of the families import what they need; nothing here depends on a family.
"""

from collections.abc import Callable
from typing import Any

from converters.errors import ConversionError
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope, write_rope
from converters.weight_rows import PadVocab, Split, Transpose, Weight
from jaxtrain.nn.config import Activation, LayerKind, ModelConfig

_LAYER = "model.layers.{layer}"
HEADS_OUT = (Split(0), Transpose((2, 0, 1)))  # [N*H, D] -> [D, N, H]
HEADS_IN = (Transpose((1, 0)), Split(0))  # [D, N*H] -> [N, H, D]
MATRIX = (Transpose((1, 0)),)  # [out, in] -> [in, out]

BASE = (
    Weight("embed.weight", "model.embed_tokens.weight", (PadVocab(0),)),
    Weight("layers.input_norm.scale", f"{_LAYER}.input_layernorm.weight"),
    Weight("layers.attn.q_proj.kernel", f"{_LAYER}.self_attn.q_proj.weight", HEADS_OUT),
    Weight("layers.attn.k_proj.kernel", f"{_LAYER}.self_attn.k_proj.weight", HEADS_OUT),
    Weight("layers.attn.v_proj.kernel", f"{_LAYER}.self_attn.v_proj.weight", HEADS_OUT),
    Weight("layers.attn.o_proj.kernel", f"{_LAYER}.self_attn.o_proj.weight", HEADS_IN),
    Weight("layers.mlp_norm.scale", f"{_LAYER}.post_attention_layernorm.weight"),
    Weight("layers.mlp.gate_proj.kernel", f"{_LAYER}.mlp.gate_proj.weight", MATRIX),
    Weight("layers.mlp.up_proj.kernel", f"{_LAYER}.mlp.up_proj.weight", MATRIX),
    Weight("layers.mlp.down_proj.kernel", f"{_LAYER}.mlp.down_proj.weight", MATRIX),
    Weight("norm.scale", "model.norm.weight"),
    Weight("lm_head.kernel", "lm_head.weight", (PadVocab(0), Transpose((1, 0)))),
    Weight("embed.weight", "lm_head.weight", (PadVocab(0),), alias=True),  # some tied checkpoints store it twice
)
QKV_BIAS = (
    Weight("layers.attn.q_proj.bias", f"{_LAYER}.self_attn.q_proj.bias", (Split(0),)),
    Weight("layers.attn.k_proj.bias", f"{_LAYER}.self_attn.k_proj.bias", (Split(0),)),
    Weight("layers.attn.v_proj.bias", f"{_LAYER}.self_attn.v_proj.bias", (Split(0),)),
)
O_BIAS = (Weight("layers.attn.o_proj.bias", f"{_LAYER}.self_attn.o_proj.bias"),)
MLP_BIAS = (
    Weight("layers.mlp.gate_proj.bias", f"{_LAYER}.mlp.gate_proj.bias"),
    Weight("layers.mlp.up_proj.bias", f"{_LAYER}.mlp.up_proj.bias"),
    Weight("layers.mlp.down_proj.bias", f"{_LAYER}.mlp.down_proj.bias"),
)
QK_NORM = (
    Weight("layers.attn.q_norm.scale", f"{_LAYER}.self_attn.q_norm.weight"),
    Weight("layers.attn.k_norm.scale", f"{_LAYER}.self_attn.k_norm.weight"),
)

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def read_sizes(keys: ConfigKeys, activation: str = "hidden_act") -> dict[str, Any]:
    """The fields of ModelConfig that dense decoders read under the same keys, except for that of the activation."""
    heads = keys.size("num_attention_heads")
    return {
        "vocab_size": keys.size("vocab_size"),
        "hidden_size": keys.size("hidden_size"),
        "intermediate_size": keys.size("intermediate_size"),
        "num_layers": keys.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads if keys.get("num_key_value_heads") is None else keys.size("num_key_value_heads"),
        "head_dim": keys.size("hidden_size") // heads if keys.get("head_dim") is None else keys.size("head_dim"),
        "norm_eps": keys.number("rms_norm_eps"),
        "activation": keys.one_of(activation, ACTIVATIONS),
        "tied": keys.flag("tie_word_embeddings"),
        "init_std": keys.number("initializer_range"),
    }


def write_sizes(config: ModelConfig, activation: str = "hidden_act") -> dict[str, Any]:
    """The inverse of `read_sizes`, and the one rope of all layers."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        **write_rope(config),
        activation: next(name for name, known in ACTIVATIONS.items() if known == config.activation),
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_std,
    }


def read_windows(keys: ConfigKeys) -> tuple[LayerKind, ...]:
    """Qwen's sliding windows: one width, on the layers that `layer_types` names, else on those from
    `max_window_layers` up; `use_sliding_window` enables them (transformers' Qwen2Config)."""
    first = keys.index("max_window_layers")
    used = keys.flag("use_sliding_window") and keys.get("sliding_window") is not None
    rope = read_rope(keys)
    sliding = read_layer_types(keys, lambda layer: used and layer >= first)
    if any(sliding) and not used:
        raise ConversionError("config.json: layer_types holds sliding_attention, but no sliding_window is in use")
    return tuple(LayerKind(keys.size("sliding_window") if slides else None, rope) for slides in sliding)


def read_layer_types(keys: ConfigKeys, sliding: Callable[[int], bool]) -> tuple[bool, ...]:
    """Whether each layer has a sliding window: by `layer_types`, or by its number if that is missing."""
    layers, types = keys.size("num_hidden_layers"), keys.get("layer_types")
    if types is None:
        return tuple(map(sliding, range(layers)))
    types = keys.names("layer_types")
    if len(types) != layers:
        raise ConversionError(f"config.json: layer_types names {len(types)} layers, num_hidden_layers is {layers}")
    strange = set(types) - {"full_attention", "sliding_attention"}
    if strange:
        raise ConversionError(f"config.json: layer_types holds {min(strange)!r}, which this family does not support")
    return tuple(kind == "sliding_attention" for kind in types)


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_windows`."""
    return {"use_sliding_window": any(kind.window for kind in config.pattern), **write_layer_types(config)}


def write_layer_types(config: ModelConfig) -> dict[str, Any]:
    """The width of the window, if there is one, and the layers that have it."""
    windows = [kind.window for kind in config.pattern]
    return {
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }
