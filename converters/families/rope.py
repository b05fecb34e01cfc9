"""Reads and writes rope in config.json, in all versions and types of transformers."""

import math
from collections.abc import Mapping
from typing import Any

from converters.errors import ConversionError
from converters.families.keys import ConfigKeys
from jaxtrain.nn.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelConfig,
    ProportionalScaling,
    Rope,
    Scaling,
    YarnScaling,
)

ROPE_KEYS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
"""The keys of config.json for rope. Export writes the first one only."""

_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor", "attention_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "proportional": ("factor",),
}
"""The keys of each rope type, in addition to `rope_theta` and `partial_rotary_factor`."""


def read_rope(keys: ConfigKeys, partial: bool = False) -> Rope:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    The precedence is that of transformers: `rope_scaling`, then `rope_parameters`, then `rope_theta`. `partial`: the
    family's attention can rotate a part of the channels; other families fail with it in transformers.
    """
    name = "rope_scaling" if keys.section("rope_scaling") else "rope_parameters"
    return _rope(keys.section(name), keys, name, keys.get("rope_theta"), partial)


def read_ropes(keys: ConfigKeys, sliding_theta: Any) -> dict[str, Rope]:
    """A rope for each layer type, as in Gemma 3 and OLMo 3: `rope_scaling` and `rope_theta` apply to full attention
    only; `sliding_theta` is the default of sliding layers."""
    given = keys.section("rope_parameters")
    thetas = {"full_attention": keys.get("rope_theta"), "sliding_attention": sliding_theta}
    strange = sorted(given.keys() - thetas.keys())
    if strange:
        raise ConversionError(f"config.json: rope_parameters.{strange[0]} is not a layer type of this family")
    per_type = ConfigKeys(given, {}, section="rope_parameters.")
    sections = {kind: per_type.section(kind) for kind in thetas}
    sections["full_attention"] = {**sections["full_attention"], **keys.section("rope_scaling")}
    ropes = {}
    for kind, theta in thetas.items():
        section = sections[kind]
        if section.get("truncate") is False:  # transformers reads it one level up, where it is never set
            raise ConversionError(f"config.json: rope_parameters.{kind}.truncate=False is not supported by this family")
        ropes[kind] = _rope(section, keys, f"rope_parameters.{kind}", theta, False)
    return ropes


def _rope(given: Mapping[str, Any], keys: ConfigKeys, name: str, theta: Any, partial: bool) -> Rope:
    kind = given.get("rope_type", given.get("type", "default"))
    outside = {
        "rope_type": kind,
        "rope_theta": theta,
        "original_max_position_embeddings": keys.get("max_position_embeddings"),
    }
    if partial or kind == "proportional":
        outside["partial_rotary_factor"] = keys.get("partial_rotary_factor") or 1.0
    if keys.get("original_max_position_embeddings") is not None:
        given = {**given, "original_max_position_embeddings": keys.get("original_max_position_embeddings")}
    rope = ConfigKeys(given, outside, section=f"{name}.")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *rope.one_of("rope_type", _TYPES)}
    known.add("original_max_position_embeddings")  # set above, whatever the type
    strange = sorted(given.keys() - known)
    if strange:
        raise ConversionError(f"config.json: {name}.{strange[0]} is not supported for rope_type {kind}")
    share = rope.number("partial_rotary_factor") if "partial_rotary_factor" in outside else 1.0
    return Rope(rope.number("rope_theta"), _scaling(rope, kind, keys), share)


def _scaling(rope: ConfigKeys, kind: str, keys: ConfigKeys) -> Scaling | None:
    match kind:
        case "linear":
            return LinearScaling(rope.number("factor"))
        case "dynamic":
            return DynamicScaling(rope.number("factor"), keys.size("max_position_embeddings"))
        case "proportional":
            return ProportionalScaling(1.0 if rope.get("factor") is None else rope.number("factor"))
        case "llama3":
            return Llama3Scaling(
                rope.number("factor"),
                rope.number("low_freq_factor"),
                rope.number("high_freq_factor"),
                rope.size("original_max_position_embeddings"),
            )
        case "yarn":
            original = rope.size("original_max_position_embeddings")
            factor = rope.number("factor")
            return YarnScaling(
                factor,
                original,
                rope.number("beta_fast") if rope.get("beta_fast") else 32.0,
                rope.number("beta_slow") if rope.get("beta_slow") else 1.0,
                _yarn_attention(rope, factor),
                rope.get("truncate") is None or rope.flag("truncate"),
            )
        case "longrope":
            original = rope.size("original_max_position_embeddings")
            factor = keys.size("max_position_embeddings") / original
            if rope.get("factor") is not None:
                factor = rope.number("factor")
            attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            if rope.get("attention_factor") is not None:
                attention = rope.number("attention_factor")
            return LongRopeScaling(rope.numbers("short_factor"), rope.numbers("long_factor"), original, attention)
    return None


def _yarn_attention(rope: ConfigKeys, factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim"))
    return scale(1.0)


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """One rope as transformers 5 writes it."""
    partial = {} if rope.partial == 1 else {"partial_rotary_factor": rope.partial}
    return {"rope_theta": rope.theta, **partial, **_scaling_parameters(rope.scaling)}


def _scaling_parameters(scaling: Scaling | None) -> dict[str, Any]:
    match scaling:
        case None:
            return {"rope_type": "default"}
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case DynamicScaling(factor):
            return {"rope_type": "dynamic", "factor": factor}
        case ProportionalScaling(factor):
            return {"rope_type": "proportional", "factor": factor}
        case YarnScaling(factor, original, fast, slow, attention, truncate, mscale):
            return {
                **({"mscale_all_dim": mscale} if mscale else {}),
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                "beta_fast": fast,
                "beta_slow": slow,
                "attention_factor": attention,
                "truncate": truncate,
            }
        case LongRopeScaling(short, long, original, attention):
            return {
                "rope_type": "longrope",
                "short_factor": list(short),
                "long_factor": list(long),
                "original_max_position_embeddings": original,
                "attention_factor": attention,
            }
        case Llama3Scaling(factor, low, high, original):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_rope`, for a model whose layers have one rope or none."""
    rope = next((kind.rope for kind in config.pattern if kind.rope is not None), None)
    return {} if rope is None else {"rope_parameters": rope_parameters(rope), **_beside(rope)}


def write_ropes(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_ropes`: a layer type without layers gets the rope of the other."""
    ropes: dict[str, Rope | None] = {"full_attention": None, "sliding_attention": None}
    for kind in config.pattern:
        ropes["full_attention" if kind.window is None else "sliding_attention"] = kind.rope
    some = next((rope for rope in ropes.values() if rope is not None), None)
    if some is None:
        return {}
    return {
        "rope_parameters": {kind: rope_parameters(rope or some) for kind, rope in ropes.items()},
        **_beside(some),
    }


def _beside(rope: Rope) -> dict[str, Any]:
    """Keys of a rope outside of its section."""
    if isinstance(rope.scaling, DynamicScaling):
        return {"max_position_embeddings": rope.scaling.max_positions}
    return {}
