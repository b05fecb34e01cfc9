"""The families there are. A new one is a file and its name here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from converters.errors import CheckpointError, nearest
from converters.families import llama, qwen2, qwen3
from converters.rows import Weight
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
    def WEIGHTS(self) -> tuple[Weight, ...]: ...

    @property
    def DERIVED(self) -> tuple[str, ...]:
        """Tensors that say nothing config.json does not: skipped on import, not exported."""
        ...

    def from_hf(self, hf: Mapping[str, Any], vocab_multiple: int = 64) -> ModelConfig: ...

    def to_hf(self, config: ModelConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]: ...


_ALL: tuple[Family, ...] = (llama, qwen2, qwen3)
FAMILIES = {family.MODEL_TYPE: family for family in _ALL}


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json, by `architectures`, or by `model_type` where that is missing.

    Raises CheckpointError naming the supported ones for any other.
    """
    known, name = FAMILIES, str(hf.get("model_type"))
    if hf.get("architectures"):
        known, name = {family.ARCHITECTURE: family for family in _ALL}, str(hf["architectures"][0])
    if name not in known:
        raise CheckpointError(
            f"config.json: architecture {name} is not supported; supported: {', '.join(known)}" + nearest(name, known)
        )
    return known[name]
