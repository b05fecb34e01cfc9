"""From the logical axes of a parameter to its place on the mesh, with errors instead of silent replication."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None
Rules = Mapping[str, MeshAxes]

ROWS = ("data", "fsdp", "expert")
"""The mesh axes that the rows of a batch are split over; "tensor" sees every row."""

_REPLICATED = {
    "layers": None,
    "norm": None,
    "head_dim": None,
    "rank": None,
    "vocab": None,
    "embed": None,
    "heads": None,
    "kv_heads": None,
    "mlp": None,
    "expert": None,
    "router": None,
}
RULES: dict[str, Rules] = {
    "fsdp": {**_REPLICATED, "embed": "fsdp"},
    "fsdp_tensor": {
        **_REPLICATED,
        "embed": "fsdp",
        "vocab": "tensor",
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
    },
    "fsdp_expert": {**_REPLICATED, "embed": "fsdp", "expert": "expert"},
}
"""Preset -> logical axis -> the mesh axis (or axes) that split it; None: every device holds all of it."""


def param_specs(axes: Any, shapes: Any, rules: Rules, mesh: Mesh) -> Any:
    """The sharding of every parameter.

    `axes` is a tree of tuples of logical axis names (or None); `shapes` is the same tree of anything with a `.shape`.
    Returns the same tree of NamedSharding.

    Raises ValueError, naming the parameter's path, the logical axis with its size and the mesh axis with its size,
    where a logical axis has no rule, a size does not divide, or one mesh axis would split two axes of a parameter.
    """

    def place(path, shape, names):
        return NamedSharding(mesh, _spec(_dotted(path), shape.shape, names, rules, mesh))

    return jax.tree_util.tree_map_with_path(place, shapes, axes)


def splits(rules: Rules, mesh_axis: str) -> bool:
    """Whether any parameter is split over `mesh_axis`."""
    return any(mesh_axis in ((axes,) if isinstance(axes, str) else axes or ()) for axes in rules.values())


def row_shares(mesh: Mesh) -> int:
    """How many parts the rows of a batch are split into."""
    return _parts(ROWS, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch lies: rows (the first axis) over `ROWS`, all else whole."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Where a scalar lies: all of it on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain_rows(x: jax.Array, mesh: Mesh | None, *tail: MeshAxes) -> jax.Array:
    """Pin `x` [B, ...] to the layout of the batch: rows split, the other axes as `tail` says (default: whole).

    The compiler is left alone with everything else. The residual stream needs the pin, or it may choose to split D
    and gather rows; without a mesh nothing happens.
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(ROWS, *tail)))


def _spec(
    name: str, shape: tuple[int, ...], logical: tuple[str | None, ...], rules: Rules, mesh: Mesh
) -> PartitionSpec:
    assert len(shape) == len(logical), (name, shape, logical)
    spec: list[MeshAxes] = []
    splits: dict[str, str] = {}  # mesh axis -> the logical axis it already splits
    for axis, size in zip(logical, shape, strict=True):
        mesh_axes = _rule(name, axis, rules)
        spec.append(mesh_axes)
        for mesh_axis in (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ():
            if mesh_axis in splits:
                raise ValueError(
                    f"{name} {shape}: mesh axis {mesh_axis!r} would split both {splits[mesh_axis]!r} and {axis!r}"
                )
            splits[mesh_axis] = str(axis)
        parts = _parts(mesh_axes, mesh)
        if size % parts:
            raise ValueError(
                f"{name} {shape}: axis {axis!r} of size {size} does not divide over mesh axis {mesh_axes!r} of size "
                f"{parts}; sizes that do: {', '.join(str(d) for d in range(1, parts) if size % d == 0)}"
            )
    return PartitionSpec(*spec)


def _rule(name: str, axis: str | None, rules: Rules) -> MeshAxes:
    if axis is None:
        return None
    if axis not in rules:
        near = difflib.get_close_matches(axis, rules, 1)
        raise ValueError(
            f"{name}: logical axis {axis!r} has no rule"
            + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(rules)}")
        )
    return rules[axis]


def _parts(mesh_axes: MeshAxes, mesh: Mesh) -> int:
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
    return math.prod(mesh.shape[name] for name in names)


def _dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
