"""Qwen3.5, the text model of the dense sizes: three gated delta nets to a layer of gated attention."""

from collections.abc import Mapping
from typing import Any

from converters.families import hybrid
from converters.families.dense import BASE, O_BIAS, QK_NORM, QKV_BIAS, read_sizes, write_sizes
from converters.families.keys import ConfigKeys
from jaxtrain.nn.config import ModelConfig

ARCHITECTURE = "Qwen3_5ForCausalLM"
MODEL_TYPE = "qwen3_5_text"
WEIGHTS = (
    *(row for row in (*BASE, *QKV_BIAS) if ".q_proj." not in row.ours),
    *(*O_BIAS, *QK_NORM, *hybrid.GATED_ATTENTION, *hybrid.DELTA, *hybrid.SEPARATE_PROJECTIONS),
)

# transformers.Qwen3_5TextConfig (5.24)
DEFAULTS: dict[str, Any] = {
    **hybrid.DEFAULTS,
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
INERT = {"mlp_bias": (None, False), "qk_norm": (None, True), "use_qk_norm": (None, True)}
_OF_IMAGES = ("mrope_section", "mrope_interleaved")  # how positions in images turn channels: those of text are one


def from_hf(hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
    """config.json to ours. Raises ConversionError naming a key that is not supported."""
    keys = ConfigKeys(with_text_rope(hf), DEFAULTS, INERT)
    return ModelConfig(family=MODEL_TYPE, **read_sizes(keys), **hybrid.read_hybrid(keys), vocab_multiple=vocab_multiple)


def hf_keys(config: ModelConfig) -> dict[str, Any]:
    return {**write_sizes(config), **hybrid.write_hybrid(config)}


def with_text_rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`hf` with the rope of tokens of text, which is that of a model without images."""
    sections = {key: hf[key] for key in ("rope_parameters", "rope_scaling") if isinstance(hf.get(key), Mapping)}
    return {**hf} | {
        key: {name: value for name, value in section.items() if name not in _OF_IMAGES}
        for key, section in sections.items()
    }
