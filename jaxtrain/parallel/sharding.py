"""Shardings of parameters by their logical axes, and of batches. Axes that do not divide are errors."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.types import Array

MeshAxes = str | tuple[str, ...] | None
Rules = Mapping[str, MeshAxes]

ROWS = ("data", "fsdp", "expert")
"""The mesh axes that the rows of a batch are sharded over; they are replicated over the others."""

CONTEXT = "context"
"""The mesh axis that the tokens of a row are sharded over, as activations: a batch itself is replicated over it."""

FSDP = ("fsdp", CONTEXT)
"""The mesh axes that parameters are sharded over, to be gathered where they are used."""

_REPLICATED = {
    "layers": None,
    "norm": None,
    "head_dim": None,
    "rank": None,
    "vocab": None,
    "embed": None,
    "latent": None,
    "heads": None,
    "kv_heads": None,
    "mlp": None,
    "expert": None,
    "router": None,
}
RULES: dict[str, Rules] = {
    "fsdp": {**_REPLICATED, "embed": FSDP, "latent": FSDP},
    "fsdp_tensor": {
        **_REPLICATED,
        "embed": FSDP,
        "latent": FSDP,
        "vocab": "tensor",
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
    },
    "fsdp_expert": {**_REPLICATED, "embed": FSDP, "latent": FSDP, "expert": "expert"},
}
"""Preset -> logical axis -> the mesh axis (or axes) that it is sharded over; None: replicated."""


def param_specs(axes: Any, shapes: Any, rules: Rules, mesh: Mesh) -> Any:
    """The sharding of every parameter.

    `axes` is a tree of tuples of logical axis names (or None), `shapes` a tree of the same structure with leaves that
    have a `.shape`, such as `jax.ShapeDtypeStruct`. Returns a tree of NamedSharding.

    Raises ValueError, naming the parameter's path and the axes with their sizes, if a logical axis has no rule, a size
    does not divide, or one mesh axis would shard two axes of a parameter.
    """

    def place(path, shape, names):
        return NamedSharding(mesh, _spec(_dotted(path), shape.shape, names, rules, mesh))

    return jax.tree_util.tree_map_with_path(place, shapes, axes)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct`s like `shapes`, with the shardings of a tree of the same structure."""

    def place(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)


def splits(rules: Rules, mesh_axis: str) -> bool:
    """Whether the rules shard a parameter over `mesh_axis`."""
    return any(mesh_axis in _names(axes) for axes in rules.values())


def row_shares(mesh: Mesh | None) -> int:
    """The number of parts that the rows of a batch are split into; 1 without a mesh."""
    return 1 if mesh is None else _parts(ROWS, mesh)


def context_shards(mesh: Mesh | None) -> int:
    """The number of parts that the tokens of a row are split into; 1 without a mesh."""
    return 1 if mesh is None else _parts(CONTEXT, mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its rows (the first axis) over `ROWS`."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds entirely, such as a scalar."""
    return NamedSharding(mesh, PartitionSpec())


def constrain_rows(x: Array, mesh: Mesh | None, *tail: MeshAxes) -> Array:
    """Constrain the sharding of `x` [B, ...]: rows over `ROWS`, the other axes over `tail` (default: unsharded).

    The residual stream needs the constraint, because the compiler may otherwise shard D and gather the rows. Without a
    mesh, `x` is returned unchanged.
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(ROWS, *tail)))


def _spec(
    name: str, shape: tuple[int, ...], logical: tuple[str | None, ...], rules: Rules, mesh: Mesh
) -> PartitionSpec:
    assert len(shape) == len(logical), (name, shape, logical)
    spec: list[MeshAxes] = []
    used: dict[str, str] = {}  # mesh axis -> the logical axis that is sharded over it
    for axis, size in zip(logical, shape, strict=True):
        mesh_axes = _rule(name, axis, rules)
        spec.append(mesh_axes)
        for mesh_axis in _names(mesh_axes):
            if mesh_axis in used:
                raise ValueError(
                    f"{name} {shape}: mesh axis {mesh_axis!r} would shard both {used[mesh_axis]!r} and {axis!r}"
                )
            used[mesh_axis] = str(axis)
        parts = _parts(mesh_axes, mesh)
        if size % parts:
            over = " x ".join(repr(mesh_axis) for mesh_axis in _names(mesh_axes) if mesh.shape[mesh_axis] > 1)
            raise ValueError(
                f"{name} {shape}: axis {axis!r} of size {size} does not divide over mesh axis {over} of size "
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


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays, or of shapes with shardings, on one of its devices. Nothing is padded."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_text(size: float) -> str:
    """Bytes as GB or MB."""
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e9 else f"{size / 1e6:.1f} MB"


def _parts(mesh_axes: MeshAxes, mesh: Mesh) -> int:
    return math.prod(mesh.shape[name] for name in _names(mesh_axes))


def _names(mesh_axes: MeshAxes) -> tuple[str, ...]:
    return (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()


def _dotted(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
