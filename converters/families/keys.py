"""Checked reads of config.json: typed values, transformers' defaults, and an error for keys that are not supported."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from converters.errors import ConversionError
from converters.families.shared_keys import REFUSED

INERT_VALUES: dict[str, tuple[Any, ...]] = {
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "no_rope_layers": (None, []),
    "alibi": (None, False),
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
"""Keys that change the computation of some families, with the values that do not. They apply to the families that do
not read the key (it is not in their DEFAULTS), in addition to `shared_keys.REFUSED`."""


class ConfigKeys:
    """The values of a config.json (or of a section of it), checked when they are read.

    `defaults` are the values of missing keys; `inert` extends INERT_VALUES by what this family does not read.
    Raises ConversionError naming the key.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        inert: Mapping[str, tuple[Any, ...]] | None = None,
        section: str = "",
        file: str = "config.json",
    ):
        self._values = {**defaults, **values}
        self._where = f"{file}: {section}"
        unread = {key: harmless for key, harmless in {**INERT_VALUES, **REFUSED}.items() if key not in defaults}
        for key, harmless in {**unread, **(inert or {})}.items():
            if key in values and values[key] not in harmless:
                raise ConversionError(
                    f"{self._where}{key}={values[key]!r} is not supported by this family; only {harmless[-1]!r} is"
                )

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def size(self, key: str) -> int:
        return self._typed(key, int, "a positive integer", lambda value: 0 < value < 2**31)

    def index(self, key: str) -> int:
        return self._typed(key, int, "an integer of at least 0", lambda value: 0 <= value < 2**31)

    def number(self, key: str) -> float:
        return float(self._typed(key, int | float, "a number above 0", is_positive))

    def numbers(self, key: str) -> tuple[float, ...]:
        return tuple(
            map(float, self._typed(key, list, "a list of numbers above 0", lambda x: all(map(is_positive, x))))
        )

    def names(self, key: str) -> list[str]:
        return self._typed(key, list, "a list of strings", lambda value: all(isinstance(name, str) for name in value))

    def section(self, key: str) -> Mapping[str, Any]:
        """An object; an empty one for null and for a missing key."""
        return {} if self.get(key) is None else self._typed(key, Mapping, "an object", lambda value: True)

    def share(self, key: str) -> float:
        return float(self._typed(key, int | float, "a number in [0, 1)", lambda value: 0 <= value < 1))

    def flag(self, key: str) -> bool:
        return self._typed(key, bool, "true or false", lambda value: True)

    def one_of(self, key: str, known: Mapping[str, Any]) -> Any:
        """The entry of `known` for the key's value."""
        value = self.get(key)
        if not isinstance(value, str) or value not in known:
            raise ConversionError(f"{self._where}{key}={value!r} is not supported; known: {', '.join(known)}")
        return known[value]

    def _typed(self, key: str, kind: Any, words: str, fits: Callable[[Any], bool]) -> Any:
        value = self.get(key)
        # bool is a subclass of int in Python, but not in JSON.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not fits(value):
            raise ConversionError(f"{self._where}{key} must be {words}, not {value!r}")
        return value


def is_positive(value: Any) -> bool:
    """Whether a JSON value is a number above 0 that a float can hold: not a bool, NaN, Infinity or a longer integer."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
