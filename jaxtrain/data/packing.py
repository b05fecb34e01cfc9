"""Examples into rows: cut what is too long, pack what is short, stack rows into a `Batch`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np

from jaxtrain.types import Batch

Item = TypeVar("Item")


class Example(NamedTuple):
    """One training sequence, before it is packed."""

    input_ids: np.ndarray  # [n] int32
    loss_weights: np.ndarray  # [n] float32, of the token itself, as in `Batch`


class Pieces(NamedTuple):
    """What is left of an example once it fits, and what was done to it: the name of a counter, or None."""

    examples: list[Example]
    event: Literal["truncated", "dropped", "split"] | None


def fit(example: Example, max_length: int, overlong: Literal["truncate", "drop", "split"]) -> Pieces:
    """Cut an example to pieces of at most `max_length` tokens, by policy.

    A piece that carries no loss weight, because the assistant only speaks beyond the cut, is left out: it would cost a
    forward pass and teach nothing. An example of which nothing is left counts as dropped.
    """
    length = len(example.input_ids)
    if length <= max_length:
        pieces, event = [example], None
    elif overlong == "drop":
        pieces, event = [], "dropped"
    elif overlong == "truncate":
        pieces, event = [_piece(example, 0, max_length)], "truncated"
    else:
        pieces, event = [_piece(example, at, max_length) for at in range(0, length, max_length)], "split"
    kept = [_first_token_unweighted(piece) for piece in pieces]
    kept = [piece for piece in kept if piece.loss_weights.any()]
    return Pieces(kept, event if kept else "dropped")


class BestFit(Generic[Item]):
    """Online best-fit packing over a bounded number of open rows.

    An item goes into the fullest open row that has room for it, else into a new row. A row is handed out when it is
    full, or when it is the fullest and its place is needed. grain's packers hand out all their open rows as soon as one
    item fits none of them, so that they need many times as many open rows for the same density, and the first batch
    comes as many times later (benchmarks/data.py).
    """

    def __init__(self, capacity: int, most_open: int, open_rows: Sequence[list[tuple[Item, int]]] = ()):
        """`most_open` 0 gives every item a row of its own. `open_rows` are those of an earlier packer, in its order."""
        self._capacity, self._most_open = capacity, most_open
        self._rows = [[item for item, _ in row] for row in open_rows]  # fullest first
        self._room = [capacity - sum(size for _, size in row) for row in open_rows]  # ascending

    @property
    def open_rows(self) -> list[list[Item]]:
        return self._rows

    def add(self, item: Item, size: int) -> list[Item] | None:
        """Place an item. Returns the row that is handed out for it, if one is."""
        assert 0 < size <= self._capacity, size
        if self._most_open == 0 or size == self._capacity:
            return [item]
        at = bisect_left(self._room, size)
        if at < len(self._room):
            room, row = self._room.pop(at) - size, self._rows.pop(at)
            row.append(item)
            return row if room == 0 else self._open(row, room)
        handed_out = self.take() if len(self._rows) == self._most_open else None
        self._open([item], self._capacity - size)
        return handed_out

    def take(self) -> list[Item] | None:
        """The fullest open row; None when there is none."""
        if not self._rows:
            return None
        self._room.pop(0)
        return self._rows.pop(0)

    def _open(self, row: list[Item], room: int) -> None:
        at = bisect_left(self._room, room)
        self._room.insert(at, room)
        self._rows.insert(at, row)


def make_row(examples: Sequence[Example], max_length: int) -> Batch:
    """Examples side by side as one row: a `Batch` whose arrays are [T]. No examples make a row of padding."""
    lengths = [len(example.input_ids) for example in examples]
    used = sum(lengths)
    starts = np.cumsum([0, *lengths])[:-1]
    tokens, positions, segment_ids = np.zeros((3, max_length), np.int32)
    row = Batch(tokens, positions, segment_ids, np.zeros(max_length, np.float32))
    if examples:
        row.tokens[:used] = np.concatenate([example.input_ids for example in examples])
        row.loss_weights[:used] = np.concatenate([example.loss_weights for example in examples])
        row.segment_ids[:used] = np.repeat(np.arange(1, len(examples) + 1), lengths)
        row.positions[:used] = np.arange(used) - np.repeat(starts, lengths)
    return row


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Rows [T] into a batch [B, T]."""
    columns = zip(*(row[:4] for row in rows), strict=True)
    tokens, positions, segment_ids, loss_weights = (np.stack(column) for column in columns)
    return Batch(tokens, positions, segment_ids, loss_weights)


def _piece(example: Example, start: int, length: int) -> Example:
    return Example(example.input_ids[start : start + length], example.loss_weights[start : start + length])


def _first_token_unweighted(example: Example) -> Example:
    # Nothing stands before a segment's first token, so nothing predicts it.
    if not example.loss_weights[:1].any():
        return example
    weights = example.loss_weights.copy()
    weights[0] = 0
    return Example(example.input_ids, weights)
