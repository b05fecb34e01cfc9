"""config.json, read with care: typed values, transformers' defaults, and a refusal of what would change the maths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from converters.errors import CheckpointError
from jaxtrain.nn.config import LinearScaling, Llama3Scaling, Rope

INERT_VALUES: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (None, 0, 1),
    "partial_rotary_factor": (None, 1.0),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "no_rope_layers": (None, []),
    "alibi": (None, False),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "clip_qkv": (None,),
    "qk_norm": (None, False),
    "use_qk_norm": (None, False),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1.0),
}
"""Keys that change the maths of some model, and the values at which they do not; none is honoured yet."""

_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""What each rope type reads beside `rope_theta`."""


class Keys:
    """The values of a config.json (or of a section of it), checked as they are read.

    `defaults` stand in for missing keys, `inert` adds to INERT_VALUES. Raises CheckpointError naming the key.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        inert: Mapping[str, tuple[Any, ...]] | None = None,
        section: str = "",
    ):
        self._values = {**defaults, **values}
        self._where = f"config.json: {section}"
        for key, harmless in {**INERT_VALUES, **(inert or {})}.items():
            if key in values and values[key] not in harmless:
                raise CheckpointError(
                    f"{self._where}{key}={values[key]!r} is not supported by this family; only {harmless[-1]!r} is"
                )

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def size(self, key: str) -> int:
        return self._typed(key, int, "a positive integer", lambda value: value > 0)

    def number(self, key: str) -> float:
        return float(self._typed(key, int | float, "a number above 0", lambda value: value > 0))

    def flag(self, key: str) -> bool:
        return self._typed(key, bool, "true or false", lambda value: True)

    def one_of(self, key: str, known: Mapping[str, Any]) -> Any:
        """What the key's value stands for."""
        if self.get(key) not in known:
            raise CheckpointError(f"{self._where}{key}={self.get(key)!r} is not supported; known: {', '.join(known)}")
        return known[self.get(key)]

    def _typed(self, key: str, kind: Any, words: str, fits: Callable[[Any], bool]) -> Any:
        value = self.get(key)
        # Python counts True as an integer; JSON does not.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not fits(value):
            raise CheckpointError(f"{self._where}{key} must be {words}, not {value!r}")
        return value


def read_rope(keys: Keys) -> Rope:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Where a file holds both, transformers' precedence: `rope_scaling`, then `rope_parameters`, then `rope_theta`.
    """
    name = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"
    given = keys.get(name) or {}
    outside = {
        "rope_type": given.get("type", "default"),
        "rope_theta": keys.get("rope_theta"),
        "original_max_position_embeddings": keys.get("max_position_embeddings"),
    }
    rope = Keys(given, outside, section=f"{name}.")
    understood = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *rope.one_of("rope_type", _ROPE_KEYS)}
    strange = sorted(given.keys() - understood)
    if strange:
        raise CheckpointError(
            f"config.json: {name}.{strange[0]} is not understood for rope_type {rope.get('rope_type')}"
        )
    return Rope(rope.number("rope_theta"), _scaling(rope))


def _scaling(rope: Keys) -> LinearScaling | Llama3Scaling | None:
    match rope.get("rope_type"):
        case "linear":
            return LinearScaling(rope.number("factor"))
        case "llama3":
            return Llama3Scaling(
                rope.number("factor"),
                rope.number("low_freq_factor"),
                rope.number("high_freq_factor"),
                rope.size("original_max_position_embeddings"),
            )
    return None


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """The inverse of `read_rope`, as transformers 5 writes it."""
    match rope.scaling:
        case LinearScaling(factor):
            return {"rope_type": "linear", "rope_theta": rope.theta, "factor": factor}
        case Llama3Scaling(factor, low, high, positions):
            return {
                "rope_type": "llama3",
                "rope_theta": rope.theta,
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": positions,
            }
    return {"rope_type": "default", "rope_theta": rope.theta}
