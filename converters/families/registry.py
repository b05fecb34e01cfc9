"""The supported families. A new one needs a file, and its name in this file."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from converters.errors import ConversionError
from converters.families import (
    arcee,
    deepseek_v3,
    exaone4,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    gpt_oss,
    granite,
    llama,
    ministral,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
)
from converters.families.rope import ROPE_KEYS
from converters.towers import TOWERS
from converters.weight_rows import Transpose, Weight
from jaxtrain.named import did_you_mean
from jaxtrain.nn.config import ModelConfig


class Family(Protocol):
    """What a family's file defines."""

    @property
    def ARCHITECTURE(self) -> str:
        """config.json's `architectures`."""
        ...

    @property
    def MODEL_TYPE(self) -> str:
        """config.json's `model_type`, and our name for the family."""
        ...

    @property
    def DEFAULTS(self) -> Mapping[str, Any]:
        """The keys of config.json that `from_hf` reads, with transformers' defaults."""
        ...

    @property
    def INERT(self) -> Mapping[str, tuple[Any, ...]]:
        """Keys that `from_hf` does not read, with the values that do not change the computation."""
        ...

    @property
    def WEIGHTS(self) -> tuple[Weight, ...]: ...

    def from_hf(self, hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig:
        """Our config from the content of a config.json. Raises ConversionError for a key that is not supported."""
        ...

    def hf_keys(self, config: ModelConfig) -> dict[str, Any]:
        """The inverse of `from_hf`: the keys of config.json that describe `config`."""
        ...


_ALL: tuple[Family, ...] = (
    *(llama, qwen2, qwen2_moe, qwen3, qwen3_moe, qwen3_next, qwen3_5, qwen3_5_moe),
    *(mixtral, gpt_oss, gemma2, gemma3, gemma4),
    *(granite, ministral, mistral, olmo2, olmo3, phi3, smollm3),
    *(arcee, exaone4, glm4, olmoe, seed_oss),
    *(deepseek_v3, glm4_moe),
)
FAMILIES: dict[str, Family] = {family.MODEL_TYPE: family for family in _ALL}
DERIVED = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)
"""Tensors that are computed from config.json: neither imported nor exported. Checkpoints of 2023 hold these frequencies
of rope; transformers also skips them for every family."""
_SCORE = Weight("value_head.kernel", "score.weight", (Transpose((1, 0)),))
_CAUSAL, _SCALAR = "ForCausalLM", "ForSequenceClassification"


def register(family: Family) -> None:
    """Add a family that is defined outside of this package. Raises ValueError if its names are taken."""
    for other in FAMILIES.values():
        if family.MODEL_TYPE == other.MODEL_TYPE or family.ARCHITECTURE == other.ARCHITECTURE:
            raise ValueError(f"a family of model_type {other.MODEL_TYPE}, {other.ARCHITECTURE}, is already registered")
    FAMILIES[family.MODEL_TYPE] = family


def weight_rows(config: ModelConfig) -> tuple[Weight, ...]:
    """The rows of the family, and that of a scalar head, which has the same name in all families."""
    return (*FAMILIES[config.family].WEIGHTS, _SCORE)


def to_hf(config: ModelConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of `config`: `base`, the one that it was read from, with the keys that changed in meaning.

    Raises ConversionError if the family's config.json cannot express `config`.
    """
    family = FAMILIES[config.family]
    # The tensors of an export are never quantised.
    hf = {key: value for key, value in (base or {}).items() if key != "quantization_config" or value is None}
    before = family.hf_keys(family.from_hf(hf, config.vocab_multiple)) if base else {}
    after = family.hf_keys(config)
    changed = {key: value for key, value in after.items() if key not in before or before[key] != value}
    if "rope_parameters" in changed:
        hf = {key: value for key, value in hf.items() if key not in ROPE_KEYS}
    names = {"architectures": [family.ARCHITECTURE], **({} if base else {"model_type": family.MODEL_TYPE})}
    hf = {**names, **hf, **changed}
    again = family.from_hf(hf, config.vocab_multiple)
    lost = [f.name for f in dataclasses.fields(config) if getattr(again, f.name) != getattr(config, f.name)]
    if lost:
        raise ConversionError(
            f"a config.json of family {config.family} cannot express {lost[0]}={getattr(config, lost[0])}"
        )
    return hf


def has_scalar_head(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a reward model: a sequence classifier with one label.

    Raises ConversionError for a classifier with several labels.
    """
    if not (_architecture(hf) or "").endswith(_SCALAR):
        return False
    labels = len(hf["id2label"]) if isinstance(hf.get("id2label"), Mapping) else hf.get("num_labels", 2)
    if labels != 1:
        raise ConversionError(f"config.json: a classifier of {labels} labels is not supported; only one (a score) is")
    return True


def _architecture(hf: Mapping[str, Any]) -> str | None:
    """The name in `architectures`, or None. Raises ConversionError if it is not a list of one name."""
    names = hf.get("architectures")
    if not names:
        return None
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ConversionError(f"config.json: architectures must be a list of one name, not {names!r}")
    return names[0]


def for_head(hf: Mapping[str, Any], config: ModelConfig, scalar: bool) -> dict[str, Any]:
    """`hf` for a model with a scalar head, or with a head over the vocabulary."""
    if not scalar and not has_scalar_head(hf):
        return dict(hf)
    causal = FAMILIES[config.family].ARCHITECTURE
    if not scalar:
        return {key: v for key, v in hf.items() if key not in ("id2label", "label2id")} | {"architectures": [causal]}
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {**hf, **labels, "architectures": [causal.replace(_CAUSAL, _SCALAR)]}


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json, by `architectures`, or by `model_type` where that is missing.

    Raises ConversionError, which lists the supported ones, for any other.
    """
    known, name = FAMILIES, str(hf.get("model_type"))
    architecture = _architecture(hf)
    if architecture:
        known = {family.ARCHITECTURE: family for family in FAMILIES.values()}
        name = architecture.replace(_SCALAR, _CAUSAL)
    if name not in known:
        hint = did_you_mean(name, known)
        raise ConversionError(
            f"config.json: architecture {name} is not supported; supported: {', '.join([*known, *TOWERS])}{hint}; "
            "`jaxtrain new-family` drafts a file for a new one; model.backend=torchax trains without one (sft only)"
        )
    return known[name]
