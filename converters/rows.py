"""A family's weight table: one row ties one parameter of ours to the checkpoint's tensors, in both directions.

A row reads forwards on import and backwards on export, so there is no second table to disagree with the first.
An op changes the layout of one tensor and can be undone. It works on rectangles as well as on whole tensors: import
asks it which part of the checkpoint's tensor a device's part of ours lies in, and reads no more than that.

`{...}` in a checkpoint's name is a leading axis of ours, filled from as many tensors: `model.layers.{layer}.x` is
stacked over layers, `...layers.{layer}.experts.{expert}.x` would be over both.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from converters.errors import CheckpointError
from jaxtrain.nn.config import ModelConfig
from jaxtrain.types import Params

Shape = tuple[int, ...]
Index = tuple[slice, ...]
"""A rectangle: one slice an axis, with explicit start and stop."""


def whole_index(shape: Shape) -> Index:
    return tuple(slice(0, size) for size in shape)


class Op(Protocol):
    """One invertible step between a checkpoint's layout (hf) and ours. Shapes are of whole arrays unless said."""

    def hf_shape(self, shape: Shape, config: ModelConfig) -> Shape:
        """The shape before this step of what has `shape` after it."""
        ...

    def hf_index(self, index: Index, shape: Shape, hf_shape: Shape) -> Index:
        """Where the rectangle `index` of ours lies before this step."""
        ...

    def to_ours(self, block: np.ndarray, shape: Shape) -> np.ndarray:
        """A rectangle, as `hf_index` names it, becomes a rectangle of `shape`."""
        ...

    def to_hf(self, array: np.ndarray, hf_shape: Shape) -> np.ndarray:
        """A whole array goes back."""
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
    """The checkpoint's `axis` becomes two of ours, (outer, inner): heads and their width. The inner one stays whole."""

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
class PadVocab:
    """The checkpoint's `axis` holds `vocab_size` rows; ours holds zero rows beyond them, which export cuts off."""

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
    """Where a part lies in the checkpoint's tensor: its slice i of `axis` is the whole's slice `first + i * step`."""

    axis: int
    size: int  # of the whole
    first: int
    step: int

    def widen(self, shape: Shape) -> Shape:
        """The shape of the whole tensor from that of the part."""
        return (*shape[: self.axis], self.size, *shape[self.axis + 1 :])

    def place(self, index: Index) -> Index:
        """Where the rectangle `index` of the part lies in the whole tensor."""
        own = index[self.axis]
        start, last = (self.first + i * self.step for i in (own.start, own.stop - 1))
        return (*index[: self.axis], slice(start, last + 1, self.step), *index[self.axis + 1 :])

    def hull(self, index: Index) -> Index:
        """The rectangle of the whole tensor around `place(index)`: other parts' slices may lie between."""
        return tuple(slice(s.start, s.stop) for s in self.place(index))

    def of(self, block: np.ndarray) -> np.ndarray:
        """A view of the part, in a block that `hull` names."""
        return block[(*[slice(None)] * self.axis, slice(None, None, self.step))]


class Part(Protocol):
    """How a tensor of the checkpoint holds several of ours. Shapes and axes are those before the row's first op."""

    def slot(self, shape: Shape, config: ModelConfig) -> Slot:
        """Of the part, which has `shape`."""
        ...


@dataclass(frozen=True)
class Interleaved:
    """Woven into each other: every `count`-th slice of `axis`, from `first` on."""

    axis: int
    first: int
    count: int

    def slot(self, shape: Shape, config: ModelConfig) -> Slot:
        return Slot(self.axis, shape[self.axis] * self.count, self.first, self.count)


@dataclass(frozen=True)
class SideBySide:
    """One after the other along `axis`, `sizes` of a config wide: the part is number `place` of them."""

    axis: int
    place: int
    sizes: Callable[[ModelConfig], tuple[int, ...]]

    def slot(self, shape: Shape, config: ModelConfig) -> Slot:
        sizes = self.sizes(config)
        assert shape[self.axis] == sizes[self.place], (shape, sizes)
        return Slot(self.axis, sum(sizes), sum(sizes[: self.place]), 1)


@dataclass(frozen=True)
class Weight:
    """One row. `ops` lead from the checkpoint's tensor, or the `part` of it that is this row's, to ours. An alias is a
    second name that a checkpoint may store the same parameter under: it must then hold the same values."""

    ours: str
    hf: str
    ops: tuple[Op, ...] = ()
    alias: bool = False
    part: Part | None = None


@dataclass(frozen=True)
class Tensor:
    """A row bound to a config: one tensor of the checkpoint, or a part of it, and the part of ours that it fills."""

    name: str
    ours: str
    stack: tuple[int, ...]  # its place on the leading axes of ours: (layer,) or ()
    ops: tuple[Op, ...]
    shapes: tuple[Shape, ...]  # before the first op (the checkpoint's), between, after the last (ours, unstacked)
    alias: bool
    slot: Slot | None  # of the part

    @property
    def shape(self) -> Shape:
        """Of the checkpoint's whole tensor."""
        return self.slot.widen(self.shapes[0]) if self.slot else self.shapes[0]

    def hf_index(self, index: Index) -> Index:
        """The rectangle of the checkpoint's tensor that holds the rectangle `index` of ours (unstacked)."""
        first = self._indices(index)[0]
        return self.slot.hull(first) if self.slot else first

    def to_ours(self, block: np.ndarray, index: Index) -> np.ndarray:
        """The rectangle `index` of ours, from `block`, the checkpoint's at `hf_index(index)`."""
        block = self.slot.of(block) if self.slot else block
        for op, after in zip(self.ops, self._indices(index)[1:], strict=True):
            block = op.to_ours(block, tuple(s.stop - s.start for s in after))
        return block

    def to_ours_in_full(self, stored: np.ndarray) -> np.ndarray:
        """Our full array (unstacked), from the checkpoint's full tensor."""
        index = whole_index(self.shapes[-1])
        return self.to_ours(stored[self.hf_index(index)], index)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The checkpoint's tensor from ours (unstacked), or this one's part of it: see `join`."""
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


def join(tensors: Sequence[Tensor], fetch: Callable[[Tensor], np.ndarray]) -> np.ndarray:
    """The checkpoint's whole tensor from all those that are parts of it; `fetch` gives ours (unstacked) for each."""
    if tensors[0].slot is None:
        return tensors[0].to_hf(fetch(tensors[0]))
    parts = [(tensor.slot, tensor.to_hf(fetch(tensor))) for tensor in tensors]
    whole = np.empty(tensors[0].shape, parts[0][1].dtype)
    for slot, values in parts:
        assert slot is not None
        whole[slot.place(whole_index(values.shape))] = values
    return whole


def by_name(tensors: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """The tensors of each name, aliases aside: more than one where they are parts of it."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        if not tensor.alias:
            groups.setdefault(tensor.name, []).append(tensor)
    return groups


def bind(rows: Sequence[Weight], shapes: Mapping[str, Shape], config: ModelConfig) -> list[Tensor]:
    """The checkpoint's tensors that make up a parameter tree of `shapes` (by dotted path).

    A row whose parameter the tree lacks (a bias, an untied head) does not apply. Raises CheckpointError for a
    parameter without a row.
    """
    unmapped = sorted(shapes.keys() - {row.ours for row in rows})
    if unmapped:
        raise CheckpointError(
            f"family {config.family} has no weight row for parameter {unmapped[0]}"
            + ("; adapters must be merged or taken out first" if "lora_" in unmapped[0] else "")
        )
    tensors = [t for row in rows if row.ours in shapes for t in _tensors(row, shapes[row.ours], config)]
    own = {t.name for t in tensors if not t.alias}
    return [t for t in tensors if not t.alias or t.name not in own]


def _tensors(row: Weight, shape: Shape, config: ModelConfig) -> Iterable[Tensor]:
    fields = [field for _, field, _, _ in string.Formatter().parse(row.hf) if field]
    shapes = [shape[len(fields) :]]
    for op in reversed(row.ops):
        shapes.insert(0, op.hf_shape(shapes[0], config))
    slot = row.part.slot(shapes[0], config) if row.part else None
    for stack in itertools.product(*(range(size) for size in shape[: len(fields)])):
        name = row.hf.format(**dict(zip(fields, stack, strict=True)))
        yield Tensor(name, row.ours, stack, row.ops, tuple(shapes), row.alias, slot)


def flatten(tree: Params) -> dict[str, Any]:
    """Nested dicts to one of dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = {f"{key}.{path}": leaf for path, leaf in flatten(value).items()} if isinstance(value, dict) else {}
        flat.update(inner or {key: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
