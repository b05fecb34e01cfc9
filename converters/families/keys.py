"""config.json, read with care: typed values, transformers' defaults, and a refusal of what would change the maths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from converters.errors import CheckpointError

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
"""Keys that change the maths of some model, and the values at which they do not: for the families that do not read
them, which is to say that their defaults lack them."""


class Keys:
    """The values of a config.json (or of a section of it), checked as they are read.

    `defaults` stand in for missing keys, `inert` adds to INERT_VALUES what this family does not read.
    Raises CheckpointError naming the key.
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
        unread = {key: harmless for key, harmless in INERT_VALUES.items() if key not in defaults}
        for key, harmless in {**unread, **(inert or {})}.items():
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

    def numbers(self, key: str) -> tuple[float, ...]:
        def fits(values: list) -> bool:
            return all(isinstance(value, int | float) and value > 0 for value in values)

        return tuple(map(float, self._typed(key, list, "a list of numbers above 0", fits)))

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
