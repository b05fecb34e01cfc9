"""Import of a Hugging Face folder: config.json as our config, tensors as sharded arrays, read shard by shard."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.errors import ConversionError
from converters.families.registry import DERIVED, family_of, weight_rows
from converters.json_files import read_json_object
from converters.quantization import without_quantization
from converters.safetensors_io import Checkpoint, check_folder, open_checkpoint
from converters.towers import text_config
from converters.weight_rows import Index, Shape, Tensor, bind, flatten, unflatten
from jaxtrain.hub import local_folder
from jaxtrain.named import did_you_mean
from jaxtrain.nn.config import ModelConfig
from jaxtrain.types import Params

ADAPTER_CONFIG = "adapter_config.json"
_MAX_FAULTS = 20  # tensors that an error lists
ShardBounds = tuple[tuple[int, int], ...]  # of a shard in its array: (start, stop) of each axis; a hashable `Index`


def read_config(source: str | Path | Mapping[str, Any], vocab_multiple: int = 64) -> tuple[ModelConfig, dict[str, Any]]:
    """Our config, and the config.json that it was read from: of a language model beside other models, its own
    (`towers.text_config`).

    `source` is a folder, a name on the hub, or the content of a config.json.

    Raises ConversionError for a missing folder or file, an unsupported architecture, and a key that is not supported.
    """
    if isinstance(source, Mapping):
        hf = dict(source)
    else:
        folder = local_folder(source)
        hf = read_json_config(folder)
        if (folder / ADAPTER_CONFIG).is_file():
            raise ConversionError(
                f"{source} holds {ADAPTER_CONFIG} next to config.json: transformers would load the adapter onto the "
                "base that it names. Use that base as the model and this folder as model.lora.path, or remove the file"
            )
    hf = text_config(hf)
    return family_of(hf).from_hf(without_quantization(hf), vocab_multiple), hf


def read_json_config(folder: Path) -> dict[str, Any]:
    """The content of the folder's config.json. Raises ConversionError if there is none, or not a JSON object."""
    check_folder(folder)
    return read_json_object(folder / "config.json")


def import_params(
    path: str | Path,
    config: ModelConfig,
    target: Params,
    *,
    partial: bool = False,
    finish: Callable[[str, jax.Array], Any] | None = None,
) -> Params:
    """Read a checkpoint into the tree of `target`, of `jax.ShapeDtypeStruct`s with the required dtype and sharding.

    Each process reads only the shards of its devices; a shard that several devices hold is read once. The largest
    parameters are read first, since each is in host memory while earlier ones are on the devices: so the peak stays
    near the size of the parameters. Leaves without a sharding go to the first device.

    `partial` allows tensors in the checkpoint that the target lacks, such as a head that is not used. `finish` maps a
    parameter, given its dotted path, to what is kept of it (a quantised one, for instance), before the next is read.

    Raises ConversionError for a missing, unexpected or misshapen tensor and for unreadable files.
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
    """The tensors that make up a tree of `shapes`, each checked against the checkpoint; aliases only if stored.
    A parameter that is stored only under its alias is read from there.

    Raises ConversionError, listing every tensor with the most similar name, for those that are missing, unexpected or
    of another shape; and for an alias whose values differ from those of the tensor.
    """
    tensors = with_aliases_resolved(bind(weight_rows(config), shapes, config), checkpoint.entries.keys(), partial)
    expected = {t.name for t in tensors}
    skipped = {name.format(layer=layer) for name in DERIVED for layer in range(config.num_layers)}
    stored = checkpoint.entries.keys() - skipped
    missing, surplus = expected - stored, set() if partial else stored - expected
    shapes_stored = {t.name: checkpoint.entries[t.name].shape for t in tensors if t.name in stored}
    misshapen = {t.name: t.shape for t in tensors if shapes_stored.get(t.name, t.shape) != t.shape}
    faults = [*sorted(missing), *sorted(surplus), *sorted(misshapen)]
    if faults:
        lines = [
            f"lacks tensor {name}{did_you_mean(name, surplus)}"
            if name in missing
            else f"holds tensor {name}, which the model of config.json lacks{did_you_mean(name, missing)}"
            if name in surplus
            else f"holds tensor {name} as {list(shapes_stored[name])}, config.json says {list(misshapen[name])}"
            for name in faults[:_MAX_FAULTS]
        ]
        lines += [f"and {len(faults) - _MAX_FAULTS} more"] if len(faults) > _MAX_FAULTS else []
        raise ConversionError(f"{checkpoint.folder} " + "\n  ".join(lines))
    for tensor in tensors:
        checkpoint.dtype(tensor.name)
    for alias in (t for t in tensors if t.alias):
        check_alias(checkpoint, alias, next(t for t in tensors if t.ours == alias.ours and not t.alias))
    return tensors


def with_aliases_resolved(tensors: list[Tensor], stored: Collection[str], partial: bool) -> list[Tensor]:
    """The tensors with aliases as a folder that holds `stored` has them: those that are not stored are dropped, and one
    replaces the tensors of its parameter if only the alias is stored. `partial`: a second copy is dropped too."""
    under_own_name = {t.ours for t in tensors if not t.alias and t.name in stored}
    under_alias_only = {t.ours for t in tensors if t.alias and t.name in stored} - under_own_name
    resolved = []
    for tensor in tensors:
        if tensor.ours in under_alias_only:
            resolved += [dataclasses.replace(tensor, alias=False)] if tensor.name in stored else []
        elif not tensor.alias or (tensor.name in stored and not partial):
            resolved.append(tensor)
    return resolved


def check_alias(checkpoint: Checkpoint, alias: Tensor, tensor: Tensor) -> None:
    """Raise ConversionError if the values of `alias` differ from those of `tensor`, or one is a part of the other."""
    if alias.shape != tensor.shape:
        raise ConversionError(
            f"{checkpoint.folder} holds {tensor.name} and {alias.name}, which are two ways to store one parameter; "
            "remove those of one"
        )
    rows = max(1, (16 << 20) // (math.prod(tensor.shape[1:]) * 4))
    for first in range(0, tensor.shape[0], rows):
        part = (slice(first, min(first + rows, tensor.shape[0])), *(slice(0, size) for size in tensor.shape[1:]))
        if not np.array_equal(checkpoint.read(alias.name, part), checkpoint.read(tensor.name, part)):
            raise ConversionError(
                f"{checkpoint.folder}: config.json ties {alias.name} to {tensor.name}, but their values differ; "
                "set tie_word_embeddings to false to keep both"
            )


def place(checkpoint: Checkpoint, leaf: jax.ShapeDtypeStruct, tensors: list[Tensor]) -> jax.Array:
    """Read one parameter: a host buffer for each distinct shard, filled by tensor, then copied to its devices."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    holders: dict[ShardBounds, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        holders.setdefault(_bounds(index, leaf.shape), []).append(device)
    # Of zeros, since an adapter may lack layers.
    buffers = {bounds: np.zeros([stop - start for start, stop in bounds], leaf.dtype) for bounds in holders}
    for tensor in tensors:
        _fill(checkpoint, tensor, buffers)
    arrays = []
    for bounds, devices in holders.items():
        buffer = buffers.pop(bounds)
        arrays += [jax.device_put(buffer, device, may_alias=False) for device in devices]
        # Wait, so that this buffer is freed before the next shard is copied.
        jax.block_until_ready(arrays[-len(devices) :])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _fill(checkpoint: Checkpoint, tensor: Tensor, buffers: Mapping[ShardBounds, np.ndarray]) -> None:
    """Read the part of one tensor that any of the shards needs, once, and copy it into their buffers."""
    depth = len(tensor.stack)
    parts = {}  # position of the shard's part within this tensor, in our layout -> the buffer's view of it
    for bounds, buffer in buffers.items():
        stacked = tuple(zip(tensor.stack, bounds[:depth], strict=True))
        if all(start <= place < stop for place, (start, stop) in stacked):
            view = buffer[tuple(place - start for place, (start, _) in stacked)]
            parts[bounds[depth:]] = view
    if not parts:
        return
    lows = [min(part[axis][0] for part in parts) for axis in range(len(tensor.shapes[-1]))]
    highs = [max(part[axis][1] for part in parts) for axis in range(len(tensor.shapes[-1]))]
    hull: Index = tuple(slice(low, high) for low, high in zip(lows, highs, strict=True))
    block = tensor.to_ours(checkpoint.read(tensor.name, tensor.hf_index(hull)), hull)
    for part, view in parts.items():
        view[...] = block[tuple(slice(a - low, b - low) for (a, b), low in zip(part, lows, strict=True))]


def _bounds(index: Index | None, shape: Shape) -> ShardBounds:
    assert index is not None
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
