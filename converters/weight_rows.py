"""A family's weight table: each row maps one of our parameters to tensors of the checkpoint, in both directions.

Import applies the ops of a row in order, export inverts them in reverse order, so one table serves both. An op changes
the layout of a tensor. It works on rectangles as well as on full tensors: import maps a device's shard of our parameter
to the part of the checkpoint's tensor that holds it, and reads only that part.

`{...}` in a checkpoint's name is a leading axis of our parameter, with one tensor for each index: the parameter of
`model.layers.{layer}.x` is stacked over layers (those that have its part of a layer: see `nn.stack`), that of
`...layers.{layer}.experts.{expert}.x` over both.
"""

import itertools
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from converters.errors import ConversionError
from jaxtrain.nn.config import ModelConfig
from jaxtrain.types import Params

Shape = tuple[int, ...]
Index = tuple[slice, ...]
"""A rectangle: one slice for each axis, with explicit start and stop."""


def full_index(shape: Shape) -> Index:
    return tuple(slice(0, size) for size in shape)


class Op(Protocol):
    """One invertible step between a checkpoint's layout (hf) and ours. Shapes are those of full arrays unless noted."""

    def hf_shape(self, shape: Shape, config: ModelConfig) -> Shape:
        """The shape before this step, given the shape after it."""
        ...

    def hf_index(self, index: Index, shape: Shape, hf_shape: Shape) -> Index:
        """The rectangle before this step that maps to `index` after it."""
        ...

    def to_ours(self, block: np.ndarray, shape: Shape) -> np.ndarray:
        """Map the rectangle at `hf_index` to one of `shape`."""
        ...

    def to_hf(self, array: np.ndarray, hf_shape: Shape) -> np.ndarray:
        """Invert this step, for a full array."""
        ...


@dataclass(frozen=True)
class Transpose:
    """Axis i of ours is axis `axes[i]` of the checkpoint's."""

    axes: tuple[int, ...]

    def hf_shape(self, shape: Shape, config: ModelConfig) -> Shape:
        return tuple(shape[i] for i in self._inverse)

    def hf_index(self, index: Index, shape: Shape, hf_shape: Shape) -> Index:
        return tuple(index[i] for i in self._inverse)

    def to_ours(self, block: np.ndarray, shape: Shape) -> np.ndarray:
        return block.transpose(self.axes)

    def to_hf(self, array: np.ndarray, hf_shape: Shape) -> np.ndarray:
        return array.transpose(self._inverse)

    @property
    def _inverse(self) -> tuple[int, ...]:
        return tuple(self.axes.index(i) for i in range(len(self.axes)))


@dataclass(frozen=True)
class Split:
    """Split the checkpoint's `axis` in two, (outer, inner): heads and their width. The inner one is never sharded."""

    axis: int

    def hf_shape(self, shape: Shape, config: ModelConfig) -> Shape:
        return (*shape[: self.axis], shape[self.axis] * shape[self.axis + 1], *shape[self.axis + 2 :])

    def hf_index(self, index: Index, shape: Shape, hf_shape: Shape) -> Index:
        outer, inner, width = index[self.axis], index[self.axis + 1], shape[self.axis + 1]
        assert (inner.start, inner.stop) == (0, width), f"the width of a head is split over devices: {inner} of {width}"
        merged = slice(outer.start * width, outer.stop * width)
        return (*index[: self.axis], merged, *index[self.axis + 2 :])

    def to_ours(self, block: np.ndarray, shape: Shape) -> np.ndarray:
        return block.reshape(shape)

    def to_hf(self, array: np.ndarray, hf_shape: Shape) -> np.ndarray:
        return array.reshape(hf_shape)


@dataclass(frozen=True)
class PairsToHalves:
    """Reorder the channels of a head, on `axis`, from rope on neighbours (2i, 2i + 1) to rope on halves (i, i + R/2).

    `rotated` is R, `first` the first of these channels: the others stay where they are. Of an axis of size 1, which an
    adapter's first factor has in place of the heads, nothing changes. The axis is never sharded.
    """

    axis: int
    rotated: int
    first: int = 0

    def hf_shape(self, shape: Shape, config: ModelConfig) -> Shape:
        return shape

    def hf_index(self, index: Index, shape: Shape, hf_shape: Shape) -> Index:
        assert index[self.axis] == slice(0, shape[self.axis]), f"the channels of a head are split: {index} of {shape}"
        return index

    def to_ours(self, block: np.ndarray, shape: Shape) -> np.ndarray:
        return block.take(self._theirs(shape[self.axis]), self.axis)

    def to_hf(self, array: np.ndarray, hf_shape: Shape) -> np.ndarray:
        return array.take(np.argsort(self._theirs(hf_shape[self.axis])), self.axis)

    def _theirs(self, size: int) -> np.ndarray:
        """Their channel for each of ours."""
        first = min(self.first, size)
        stop = min(first + self.rotated, size)
        pairs = np.arange(first, stop, 2), np.arange(first + 1, stop, 2)
        return np.concatenate([np.arange(first), *pairs, np.arange(stop, size)])


@dataclass(frozen=True)
class Drop:
    """Drop `count` axes of size 1 at `at` of the checkpoint's layout."""

    at: int
    count: int

    def hf_shape(self, shape: Shape, config: ModelConfig) -> Shape:
        return (*shape[: self.at], *[1] * self.count, *shape[self.at :])

    def hf_index(self, index: Index, shape: Shape, hf_shape: Shape) -> Index:
        return (*index[: self.at], *[slice(0, 1)] * self.count, *index[self.at :])

    def to_ours(self, block: np.ndarray, shape: Shape) -> np.ndarray:
        return block.reshape(shape)

    def to_hf(self, array: np.ndarray, hf_shape: Shape) -> np.ndarray:
        return array.reshape(hf_shape)


@dataclass(frozen=True)
class PadVocab:
    """Pad the checkpoint's `axis` of `vocab_size` rows with zeros; export removes them."""

    axis: int

    def hf_shape(self, shape: Shape, config: ModelConfig) -> Shape:
        return (*shape[: self.axis], config.vocab_size, *shape[self.axis + 1 :])

    def hf_index(self, index: Index, shape: Shape, hf_shape: Shape) -> Index:
        size, rows = hf_shape[self.axis], index[self.axis]
        real = slice(min(rows.start, size), min(rows.stop, size))
        return (*index[: self.axis], real, *index[self.axis + 1 :])

    def to_ours(self, block: np.ndarray, shape: Shape) -> np.ndarray:
        if block.shape == shape:
            return block
        padded = np.zeros(shape, block.dtype)
        padded[tuple(slice(size) for size in block.shape)] = block
        return padded

    def to_hf(self, array: np.ndarray, hf_shape: Shape) -> np.ndarray:
        return array[tuple(slice(size) for size in hf_shape)]


@dataclass(frozen=True)
class Slot:
    """The location of a part in a fused tensor: blocks of `width` slices of `axis`, of which block i begins at slice
    `first + i * step` of the tensor."""

    axis: int
    size: int  # of `axis` in the fused tensor
    first: int
    step: int
    width: int = 1

    def widen(self, shape: Shape) -> Shape:
        """The shape of the fused tensor, given that of the part."""
        return (*shape[: self.axis], self.size, *shape[self.axis + 1 :])

    def place(self, index: Index) -> tuple[slice | np.ndarray, ...]:
        """The location of the rectangle `index` of the part in the fused tensor, as an index of numpy."""
        own = np.arange(index[self.axis].start, index[self.axis].stop)
        places = self.first + own // self.width * self.step + own % self.width
        return (*index[: self.axis], places, *index[self.axis + 1 :])

    def hull(self, index: Index) -> Index:
        """The bounding rectangle of `place(index)` in the fused tensor; it may include slices of other parts."""
        places = self.place(index)[self.axis]
        assert isinstance(places, np.ndarray)
        return (*index[: self.axis], slice(int(places[0]), int(places[-1]) + 1), *index[self.axis + 1 :])

    def of(self, block: np.ndarray, index: Index) -> np.ndarray:
        """The rectangle `index` of the part in a block read at `hull(index)`."""
        places = self.place(index)[self.axis]
        assert isinstance(places, np.ndarray)
        return block.take(places - places[0], self.axis)


class Part(Protocol):
    """How a fused tensor of the checkpoint holds several of ours. Shapes and axes are those before the first op."""

    def slot(self, shape: Shape, config: ModelConfig) -> Slot:
        """The slot of the part, given its shape."""
        ...


@dataclass(frozen=True)
class Interleaved:
    """Interleaved parts: every `count`-th slice of `axis`, starting at `first`."""

    axis: int
    first: int
    count: int

    def slot(self, shape: Shape, config: ModelConfig) -> Slot:
        return Slot(self.axis, shape[self.axis] * self.count, self.first, self.count)


@dataclass(frozen=True)
class SideBySide:
    """Concatenated parts along `axis`, of `sizes(config)`; this one is number `place`. With `groups`, the tensor has so
    many groups, each of which has all parts one after the other."""

    axis: int
    place: int
    sizes: Callable[[ModelConfig], tuple[int, ...]]
    groups: Callable[[ModelConfig], int] = lambda config: 1

    def slot(self, shape: Shape, config: ModelConfig) -> Slot:
        sizes, groups = self.sizes(config), self.groups(config)
        width = sizes[self.place]
        assert shape[self.axis] == width * groups, (shape, sizes, groups)
        return Slot(self.axis, sum(sizes) * groups, sum(sizes[: self.place]), sum(sizes), width)


@dataclass(frozen=True)
class Weight:
    """One row. `ops` map the checkpoint's tensor, or this row's `part` of it, to our parameter; one that depends on the
    config is a function of it. An alias is another name under which a checkpoint may store the same parameter; if it
    stores both, their values must be equal."""

    ours: str
    hf: str
    ops: tuple[Op | Callable[[ModelConfig], Op], ...] = ()
    alias: bool = False
    part: Part | None = None


@dataclass(frozen=True)
class Tensor:
    """A row bound to a config: a tensor of the checkpoint (or a part of it) and the slice of our parameter."""

    name: str
    ours: str
    stack: tuple[int, ...]  # its index on the leading axes of our parameter, of which the first is that of layers
    layers: tuple[int, ...]  # the layers that our parameter is stacked over
    ops: tuple[Op, ...]
    shapes: tuple[Shape, ...]  # before the first op (the checkpoint's), between, after the last (ours, unstacked)
    alias: bool
    slot: Slot | None  # in a fused tensor

    @property
    def shape(self) -> Shape:
        """The shape of the checkpoint's full tensor."""
        return self.slot.widen(self.shapes[0]) if self.slot else self.shapes[0]

    def hf_index(self, index: Index) -> Index:
        """The rectangle of the checkpoint's tensor for the rectangle `index` of ours (unstacked)."""
        first = self._indices(index)[0]
        return self.slot.hull(first) if self.slot else first

    def to_ours(self, block: np.ndarray, index: Index) -> np.ndarray:
        """The rectangle `index` of ours, given the checkpoint's at `hf_index(index)`."""
        first, *others = self._indices(index)
        block = self.slot.of(block, first) if self.slot else block
        for op, after in zip(self.ops, others, strict=True):
            block = op.to_ours(block, tuple(s.stop - s.start for s in after))
        return block

    def to_ours_in_full(self, stored: np.ndarray) -> np.ndarray:
        """Our full array (unstacked), from the checkpoint's full tensor."""
        index = full_index(self.shapes[-1])
        return self.to_ours(stored[self.hf_index(index)], index)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The checkpoint's tensor, given ours (unstacked); for a fused tensor this part of it: see `fuse`."""
        for op, hf_shape in zip(reversed(self.ops), reversed(self.shapes[:-1]), strict=True):
            array = op.to_hf(array, hf_shape)
        return array

    def _indices(self, index: Index) -> list[Index]:
        indices = [index]
        for op, shape, hf_shape in zip(
            reversed(self.ops), reversed(self.shapes[1:]), reversed(self.shapes[:-1]), strict=True
        ):
            indices.insert(0, op.hf_index(indices[0], shape, hf_shape))
        return indices


def fuse(tensors: Sequence[Tensor], fetch: Callable[[Tensor], np.ndarray]) -> np.ndarray:
    """The checkpoint's full tensor from its parts; `fetch` returns our array (unstacked) for each."""
    if tensors[0].slot is None:
        return tensors[0].to_hf(fetch(tensors[0]))
    parts = [(tensor.slot, tensor.to_hf(fetch(tensor))) for tensor in tensors]
    fused = np.empty(tensors[0].shape, parts[0][1].dtype)
    for slot, values in parts:
        assert slot is not None
        fused[slot.place(full_index(values.shape))] = values
    return fused


def by_name(tensors: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """The tensors by name, without aliases: several for a fused tensor."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        if not tensor.alias:
            groups.setdefault(tensor.name, []).append(tensor)
    return groups


def bind(rows: Sequence[Weight], shapes: Mapping[str, Shape], config: ModelConfig) -> list[Tensor]:
    """The checkpoint's tensors that make up a parameter tree of `shapes` (by dotted path).

    A row is skipped if the tree lacks its parameter (a bias, an untied head). Raises ConversionError for a parameter
    without a row.
    """
    unmapped = sorted(shapes.keys() - {row.ours for row in rows})
    if unmapped:
        raise ConversionError(
            f"family {config.family} has no weight row for parameter {unmapped[0]}"
            + ("; adapters must be merged or removed first" if "lora_" in unmapped[0] else "")
        )
    tensors = [t for row in rows if row.ours in shapes for t in _tensors(row, shapes[row.ours], config)]
    own = {t.name for t in tensors if not t.alias}
    return [t for t in tensors if not t.alias or t.name not in own]


def _tensors(row: Weight, shape: Shape, config: ModelConfig) -> Iterable[Tensor]:
    fields = [field for _, field, _, _ in string.Formatter().parse(row.hf) if field]
    shapes = [shape[len(fields) :]]
    ops = tuple(op(config) if callable(op) else op for op in row.ops)
    for op in reversed(ops):
        shapes.insert(0, op.hf_shape(shapes[0], config))
    slot = row.part.slot(shapes[0], config) if row.part else None
    _, _, inner = row.ours.partition("layers.")
    layers = config.layers_of(inner.partition(".")[0])
    for stack in itertools.product(*(range(size) for size in shape[: len(fields)])):
        numbers = {**dict(zip(fields, stack, strict=True)), **({"layer": layers[stack[0]]} if inner else {})}
        yield Tensor(row.hf.format(**numbers), row.ours, stack, layers, ops, tuple(shapes), row.alias, slot)


def flatten(tree: Params) -> dict[str, Any]:
    """Nested dicts to one dict of dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = {f"{key}.{path}": leaf for path, leaf in flatten(value).items()} if isinstance(value, dict) else {}
        flat.update(inner or {key: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
