"""Arcee (AFM): Llama whose feed-forward layers have no gate and a squared relu."""

from collections.abc import Mapping
from typing import Any

from converters.families.dense import BASE, MLP_BIAS, O_BIAS, QKV_BIAS, read_sizes, write_sizes
from converters.families.keys import ConfigKeys
from converters.families.rope import read_rope
from jaxtrain.nn.config import LayerKind, ModelConfig

ARCHITECTURE = "ArceeForCausalLM"
MODEL_TYPE = "arcee"
WEIGHTS = tuple(row for row in (*BASE, *QKV_BIAS, *O_BIAS, *MLP_BIAS) if ".gate_proj." not in row.ours)

# transformers.ArceeConfig (5.24)
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2560,
    "intermediate_size": 18432,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
INERT: dict[str, tuple[Any, ...]] = {}


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(hf, DEFAULTS, INERT)
    return ModelConfig(
        family=MODEL_TYPE,
        **read_sizes(keys),
        qkv_bias=keys.flag("attention_bias"),
        o_bias=keys.flag("attention_bias"),
        mlp_bias=keys.flag("mlp_bias"),
        mlp_gate=False,
        pattern=(LayerKind(None, read_rope(keys)),) * keys.size("num_hidden_layers"),
        vocab_multiple=vocab_multiple,
    )


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }
