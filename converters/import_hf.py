"""A Hugging Face folder in: its config as ours, its tensors as sharded arrays, read shard by shard."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.errors import CheckpointError, nearest
from converters.families.registry import FAMILIES, family_of, weight_rows
from converters.rows import Index, Shape, Tensor, bind, flatten, unflatten
from converters.safetensors_io import Checkpoint, check_folder, open_checkpoint
from jaxtrain.nn.config import ModelConfig
from jaxtrain.types import Params

_FAULTS = 20  # tensors that an error lists
Bounds = tuple[tuple[int, int], ...]  # of a shard in its array: (start, stop) of each axis; an `Index` that hashes


def read_config(source: str | Path | Mapping[str, Any], vocab_multiple: int = 64) -> tuple[ModelConfig, dict[str, Any]]:
    """Our config and the config.json it came from; `source` is a folder, or a config.json's content.

    Raises CheckpointError for a missing folder or file, an unsupported architecture, and a key that cannot be honoured.
    """
    hf = dict(source) if isinstance(source, Mapping) else read_json_config(Path(source))
    return family_of(hf).from_hf(hf, vocab_multiple), hf


def read_json_config(folder: Path) -> dict[str, Any]:
    check_folder(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no config.json")
    try:
        hf = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(hf, dict):
        raise CheckpointError(f"{file} must be an object, not {type(hf).__name__}")
    return hf


def import_params(
    path: str | Path,
    config: ModelConfig,
    target: Params,
    *,
    partial: bool = False,
    finish: Callable[[str, jax.Array], Any] | None = None,
) -> Params:
    """Read a checkpoint into the tree of `target`: `jax.ShapeDtypeStruct`s with the dtype and sharding wanted.

    Each process reads what its own devices hold; a shard that several devices hold is read once. The largest
    parameters go first: while one is read it is in memory beside those already placed, so the peak stays near the
    size of the parameters themselves. Leaves without a sharding go to the first device.

    `partial` lets the checkpoint hold more than the target: a head that is not wanted. `finish` makes of a parameter,
    given its dotted path, what is kept of it, before the next one is read.

    Raises CheckpointError for a missing, left-over or misshapen tensor and for unreadable files.
    """
    leaves = flatten(target)
    with open_checkpoint(path) as checkpoint:
        shapes = {ours: leaf.shape for ours, leaf in leaves.items()}
        tensors = bind_checkpoint(checkpoint, config, shapes, partial=partial)
        params = {}
        for ours, leaf in sorted(leaves.items(), key=lambda item: -math.prod(item[1].shape)):
            array = place(checkpoint, leaf, [t for t in tensors if t.ours == ours and not t.alias])
            params[ours] = finish(ours, array) if finish else array
    return unflatten({ours: params[ours] for ours in leaves})


def bind_checkpoint(
    checkpoint: Checkpoint, config: ModelConfig, shapes: Mapping[str, Shape], *, partial: bool = False
) -> list[Tensor]:
    """The tensors that make up a tree of `shapes`, each one checked against the checkpoint; aliases only where stored.

    Raises CheckpointError, naming every tensor and the nearest name, for those that are missing, left over or of
    another shape; and for an alias of other values.
    """
    family = FAMILIES[config.family]
    tensors = bind(weight_rows(config), shapes, config)
    tensors = [t for t in tensors if not t.alias or (t.name in checkpoint.entries and not partial)]
    expected = {t.name for t in tensors}
    skipped = {name.format(layer=layer) for name in family.DERIVED for layer in range(config.num_layers)}
    stored = checkpoint.entries.keys() - skipped
    missing, surplus = expected - stored, set() if partial else stored - expected
    shapes_stored = {t.name: checkpoint.entries[t.name].shape for t in tensors if t.name in stored}
    misshapen = {t.name: t.shape for t in tensors if shapes_stored.get(t.name, t.shape) != t.shape}
    faults = [*sorted(missing), *sorted(surplus), *sorted(misshapen)]
    if faults:
        lines = [
            f"lacks tensor {name}{nearest(name, surplus)}"
            if name in missing
            else f"holds tensor {name}, which config.json leaves no place for{nearest(name, missing)}"
            if name in surplus
            else f"holds tensor {name} as {list(shapes_stored[name])}, config.json says {list(misshapen[name])}"
            for name in faults[:_FAULTS]
        ]
        lines += [f"and {len(faults) - _FAULTS} more"] if len(faults) > _FAULTS else []
        raise CheckpointError(f"{checkpoint.folder} " + "\n  ".join(lines))
    for tensor in tensors:
        checkpoint.dtype(tensor.name)
    for alias in (t for t in tensors if t.alias):
        _check_alias(checkpoint, alias, next(t for t in tensors if t.ours == alias.ours and not t.alias))
    return tensors


def _check_alias(checkpoint: Checkpoint, alias: Tensor, tensor: Tensor) -> None:
    rows = max(1, (16 << 20) // (math.prod(tensor.shape[1:]) * 4))
    for first in range(0, tensor.shape[0], rows):
        part = (slice(first, min(first + rows, tensor.shape[0])), *(slice(0, size) for size in tensor.shape[1:]))
        if not np.array_equal(checkpoint.read(alias.name, part), checkpoint.read(tensor.name, part)):
            raise CheckpointError(
                f"{checkpoint.folder}: config.json ties {alias.name} to {tensor.name}, but their values differ; "
                "set tie_word_embeddings to false to keep both"
            )


def place(checkpoint: Checkpoint, leaf: jax.ShapeDtypeStruct, tensors: list[Tensor]) -> jax.Array:
    """One parameter: a host buffer for each distinct shard, filled tensor by tensor, then put onto its devices."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    holders: dict[Bounds, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        holders.setdefault(_bounds(index, leaf.shape), []).append(device)
    buffers = {bounds: np.empty([stop - start for start, stop in bounds], leaf.dtype) for bounds in holders}
    for tensor in tensors:
        _fill(checkpoint, tensor, buffers)
    arrays = []
    for bounds, devices in holders.items():
        buffer = buffers.pop(bounds)
        arrays += [jax.device_put(buffer, device, may_alias=False) for device in devices]
        # Wait, so that this buffer is gone before the next shard is copied.
        jax.block_until_ready(arrays[-len(devices) :])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _fill(checkpoint: Checkpoint, tensor: Tensor, buffers: Mapping[Bounds, np.ndarray]) -> None:
    """Read the part of one tensor that any of the shards needs, once, and deal it out."""
    depth = len(tensor.stack)
    parts = {}  # where the shard's part of this tensor lies in ours -> the buffer's view of it
    for bounds, buffer in buffers.items():
        if all(start <= place < stop for place, (start, stop) in zip(tensor.stack, bounds, strict=False)):
            view = buffer[tuple(place - start for place, (start, _) in zip(tensor.stack, bounds, strict=False))]
            parts[bounds[depth:]] = view
    if not parts:
        return
    lows = [min(part[axis][0] for part in parts) for axis in range(len(tensor.shapes[-1]))]
    highs = [max(part[axis][1] for part in parts) for axis in range(len(tensor.shapes[-1]))]
    hull: Index = tuple(slice(low, high) for low, high in zip(lows, highs, strict=True))
    block = tensor.to_ours(checkpoint.read(tensor.name, tensor.hf_index(hull)), hull)
    for part, view in parts.items():
        view[...] = block[tuple(slice(a - low, b - low) for (a, b), low in zip(part, lows, strict=True))]


def _bounds(index: Index | None, shape: Shape) -> Bounds:
    assert index is not None
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
