"""Bytes of arrays on one device, by what they are."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtrain.parallel.sharding import device_bytes
from jaxtrain.plan.compile import Compiled
from jaxtrain.plan.programs import Program


def memory_by_kind(program: Program, compiled: Compiled) -> dict[str, int]:
    """Of a compiled program on one device: its inputs by kind, as they are laid out; and the compiler's temporaries, of
    which the gradients are a part in an update: all of them are in memory at its end.

    The sum is `Compiled.arguments` + `Compiled.temporaries`, since the compiler pads what it lays out.
    """
    kinds = {kind: device_bytes(tree) for kind, tree in program.inputs.items()}
    kinds = {kind: size for kind, size in kinds.items() if size}
    kinds["padding and scalars"] = compiled.arguments - sum(kinds.values())
    gradients = min(device_bytes(program.gradients), compiled.temporaries) if program.gradients is not None else 0
    if gradients:
        kinds["gradients"] = gradients
    kinds["activations and temporaries"] = compiled.temporaries - gradients
    return kinds


def total(kinds: Mapping[str, int]) -> int:
    return sum(kinds.values())
