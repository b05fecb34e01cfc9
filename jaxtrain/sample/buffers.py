"""`Buffers`: the slots' keys, values and marks on the device, and the few shapes that they may have."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxtrain.nn.cache import columns_of
from jaxtrain.nn.model import Model
from jaxtrain.sample import decode as programs
from jaxtrain.sample.placement import beside, empty_buffers, row_shares
from jaxtrain.types import Params

_LEAST_COLUMNS, _LEAST_PROMPT = 64, 32
_PART, _LEAST_SLOTS = 4, 8  # the smaller number of rows: this part of the slots, where there are so many

Prompt = tuple[int, ...]


class Buffers:
    """What a decode step reads grows with the rows and columns of the buffers, so they are no larger than need be."""

    def __init__(self, model: Model, params: Params, slots: int, max_length: int):
        self._model, self.slots = model, slots
        shares = row_shares(model)
        self.few = -(-slots // (_PART * shares)) * shares if slots >= _LEAST_SLOTS else slots
        """Rows of the smaller of the two sizes, for when few slots are live and none waits."""
        self.lengths = _lengths(max_length, _LEAST_COLUMNS)
        """Columns that there may be."""
        self.prompt_lengths = _lengths(max_length, _LEAST_PROMPT)
        """How many tokens a prefill may be padded to."""
        self.rows, self.columns = slots, self.lengths[0]
        self.cache, self.marks = beside(model, params, empty_buffers(model, slots, self.columns))
        self.held: list[Prompt | None] = [None] * slots
        """The prompt whose keys and values a slot holds."""

    def prompt_length_for(self, tokens: int) -> int:
        return _least(self.prompt_lengths, tokens)

    def fit(self, tokens: int, rows: int | None = None) -> None:
        """Make the buffers as long as `tokens` need, layer by layer, and of so many rows if that is given."""
        columns, rows = _least(self.lengths, tokens), self.rows if rows is None else rows
        if rows != self.rows:
            self._resize(rows, self.columns)
            self.marks = programs.resize_marks(self._model, self.marks, rows)
        # One length at a time, so that few programs do it.
        at, wanted = self.lengths.index(self.columns), self.lengths.index(columns)
        while at != wanted:
            at += 1 if wanted > at else -1
            self._resize(rows, self.lengths[at])
        # What a slot held counts only where it still is.
        self.held = [
            held if row < rows and held is not None and len(held) <= columns else None
            for row, held in enumerate(self.held)
        ]

    def _resize(self, rows: int, columns: int) -> None:
        layers, self.cache = list(self.cache), ()
        for index, kind in enumerate(self._model.config.pattern):
            wanted = columns_of(kind, columns)
            if (rows, wanted) != (self.rows, layers[index].columns):
                layers[index] = programs.resize(self._model, layers[index], rows, wanted)
        self.cache, self.rows, self.columns = tuple(layers), rows, columns

    def insert(self, fresh: programs.Layers, rows: Sequence[int], slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Put `rows` of a prefill, so many tokens long, into `slots`."""
        places = (self._padded(each) for each in (rows, slots, lengths))
        self.cache = programs.insert(self._model, self.cache, fresh, *places, np.int32(len(slots)))

    def fork(self, sources: Sequence[int], slots: Sequence[int]) -> None:
        """Copy the keys and values of one slot to another."""
        places = self._padded(sources), self._padded(slots)
        self.cache = programs.fork(self._model, self.cache, *places, np.int32(len(slots)))

    def move(self, sources: Sequence[int], slots: Sequence[int]) -> None:
        """Copy all that there is of one slot to another."""
        self.fork(sources, slots)
        places = self._padded(sources), self._padded(slots)
        self.marks = programs.move_marks(self.marks, *places, np.int32(len(slots)))
        for source, slot in zip(sources, slots, strict=True):
            self.held[slot] = self.held[source]

    def mark(self, row: np.ndarray, slot: int) -> None:
        """Set the marks [V] of a slot."""
        self.marks = programs.mark(self.marks, row, np.int32(slot))

    def _padded(self, values: Sequence[int]) -> np.ndarray:
        return np.pad(np.asarray(values, np.int32), (0, self.slots - len(values)))


def _least(lengths: tuple[int, ...], tokens: int) -> int:
    """The least that holds so many tokens, or the longest."""
    return next((length for length in lengths if length >= tokens), lengths[-1])


def _lengths(max_length: int, least: int) -> tuple[int, ...]:
    """Powers of two from `least` on, and what lies half-way between, up to `max_length`."""
    sizes = {max_length}
    for power in range(int(math.log2(least)), max_length.bit_length()):
        sizes |= {2**power, 3 * 2 ** (power - 1)}
    return tuple(sorted(size for size in sizes if size <= max_length))
