"""The language model of a folder that holds other models beside it, as those that also read images.

Its config.json and tensors are read as those of the family without the others: `text_config` of config.json becomes the
whole, and the tensors get the names of the family, whatever prefix they are stored under. The other models are not run.
`export_towers` writes their tensors, unchanged, together with a trained language model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from converters.errors import ConversionError

_EMBED, _HEAD = "embed_tokens.weight", "lm_head.weight"
_PARTS = (  # of a language model, after its prefix
    *("embed_tokens.", "layers.", "norm."),
    *("embed_tokens_per_layer.", "per_layer_model_projection.", "per_layer_projection_norm."),
)
_PREDICTION, _MAX_PREDICTION = ("num_nextn_predict_layers", "num_mtp_layers"), 64
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Tower:
    """The family of a language model, by the architecture of the folder."""

    architecture: str
    model_type: str
    types: tuple[str, ...]  # model_type of its text_config
    tied: bool  # where neither the top level nor text_config says it
    flat: bool = False  # config.json may have the keys of the language model at its top level
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of text_config, where they are not those of the family


_QWEN2_VL = Tower(
    "Qwen2ForCausalLM",
    "qwen2",
    ("qwen2_5_vl_text", "qwen2_5_vl", "qwen2_vl_text", "qwen2_vl"),
    tied=False,
    flat=True,
    defaults={
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_window_layers": 80,
        "rope_theta": 1000000.0,
    },
)
TOWERS = {
    "Gemma3ForConditionalGeneration": Tower("Gemma3ForCausalLM", "gemma3_text", ("gemma3_text",), tied=True),
    "Gemma4ForConditionalGeneration": Tower("Gemma4ForCausalLM", "gemma4_text", ("gemma4_text",), tied=True),
    "Qwen2VLForConditionalGeneration": _QWEN2_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN2_VL,
    "Qwen3VLForConditionalGeneration": Tower(
        "Qwen3ForCausalLM",
        "qwen3",
        ("qwen3_vl_text",),
        tied=False,
        defaults={"max_position_embeddings": 128000, "rope_theta": 500000.0},
    ),
    "Qwen3_5ForConditionalGeneration": Tower("Qwen3_5ForCausalLM", "qwen3_5_text", ("qwen3_5_text",), tied=False),
    "Qwen3_5MoeForConditionalGeneration": Tower(
        "Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", ("qwen3_5_moe_text",), tied=False
    ),
    # Mistral3Config ties by default, but published folders hold a head of their own, which transformers then uses.
    "Mistral3ForConditionalGeneration": Tower("MistralForCausalLM", "mistral", ("mistral",), tied=False),
}


def tower_of(hf: Mapping[str, Any]) -> Tower | None:
    names = hf.get("architectures")
    return TOWERS.get(names[0]) if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else None


def has_section(hf: Mapping[str, Any]) -> bool:
    """Whether the keys of the language model are in `text_config`, not at the top level."""
    return hf.get("text_config") is not None


def text_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the language model alone; `hf` itself if it holds nothing else.

    Raises ConversionError for a `text_config` that is missing, no object, or of another model.
    """
    tower = tower_of(hf)
    if tower is None:
        return dict(hf)
    section = hf.get("text_config") if has_section(hf) or not tower.flat else hf
    if not isinstance(section, Mapping):
        raise ConversionError(f"config.json: text_config must be an object, not {section!r}")
    if section.get("model_type", tower.types[0]) not in tower.types:
        raise ConversionError(
            f"config.json: text_config.model_type={section['model_type']!r} is not supported in "
            f"{hf['architectures'][0]}; known: {', '.join(tower.types)}"
        )
    text = {**tower.defaults, **section, "architectures": [tower.architecture], "model_type": tower.model_type}
    for key in ("text_config", "vision_config"):
        text.pop(key, None)
    if "dtype" not in text and "torch_dtype" not in text:
        text |= {key: hf[key] for key in ("dtype", "torch_dtype") if key in hf}
    text |= {key: hf[key] for key in _TOKENS if text.get(key) is None and hf.get(key) is not None}
    text |= {"quantization_config": hf["quantization_config"]} if "quantization_config" in hf else {}
    tied = hf.get("tie_word_embeddings", section.get("tie_word_embeddings"))
    text["tie_word_embeddings"] = tower.tied if tied is None else tied
    return text | {key: _one_position(text[key]) for key in ("rope_scaling", "rope_parameters") if key in text}


def _one_position(rope: Any) -> Any:
    """A rope that turns parts of the channels by row and column of an image: of text, all are the same position."""
    if not isinstance(rope, Mapping):
        return rope
    kept = {key: value for key, value in rope.items() if key not in ("mrope_section", "mrope_interleaved")}
    return {key: "default" if value == "mrope" else value for key, value in kept.items()}


def unused_prefixes(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the tensors that plain decoding does not use, as config.json of a language model declares them: the
    layers of multi-token prediction, which come after the last one, and the projections of keys and values of layers
    that use those of others."""
    layers = hf.get("num_hidden_layers")
    count = next((hf[key] for key in _PREDICTION if hf.get(key) is not None), 0)
    shared = hf.get("num_kv_shared_layers", 0)
    if type(layers) is not int or type(count) is not int or type(shared) is not int:
        return ()
    return (
        *(f"model.layers.{layers + number}." for number in range(min(count, _MAX_PREDICTION))),
        *(
            f"model.layers.{layer}.self_attn.{name}."
            for layer in range(max(layers - max(shared, 0), 0), layers)
            for name in ("k_proj", "v_proj", "k_norm", "v_norm")
        ),
    )


@dataclass(frozen=True)
class TextNames:
    """How a folder names the tensors of its language model."""

    prefix: str  # of `embed_tokens.weight`
    head: str  # the name of lm_head.weight

    def stored(self, name: str) -> str:
        """The folder's name for a tensor of the family (`model.layers.0 ...`)."""
        return self.head if name == _HEAD else self.prefix + name.removeprefix("model.")

    def plain(self, name: str) -> str | None:
        """The family's name for a tensor of the folder; None for one of another model."""
        if name == self.head:
            return _HEAD
        rest = name.removeprefix(self.prefix)
        return f"model.{rest}" if name.startswith(self.prefix) and rest.startswith(_PARTS) else None


PLAIN_NAMES = TextNames("model.", _HEAD)
"""Of a folder whose language model is stored under the names of its family."""


def text_names(stored: Iterable[str]) -> TextNames:
    """Finds the prefix of the language model. Raises ConversionError if there is not exactly one embedding."""
    names = list(stored)
    embeddings = [name for name in names if name == _EMBED or name.endswith(f".{_EMBED}")]
    heads = [name for name in names if name == _HEAD or name.endswith(f".{_HEAD}")]
    if len(embeddings) != 1 or len(heads) > 1:
        found = ", ".join(embeddings + heads) or "none"
        raise ConversionError(
            f"the language model cannot be told from the other models: one {_EMBED} expected: {found}"
        )
    prefix = embeddings[0].removesuffix(_EMBED)
    nested = prefix.removesuffix("model.") if prefix.endswith(".model.") else ""
    return TextNames(prefix, heads[0] if heads else f"{nested}{_HEAD}")
