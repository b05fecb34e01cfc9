"""Examples and bundles into rows: cut what is too long, pack what is short, stack rows into a `Batch`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from jaxtrain.types import Array, Batch, Bundle, Example

Item = TypeVar("Item")


Overlong = Literal["truncate", "drop", "split", "keep_completion"]
SignalTypes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
"""Of each signal: its dtype, and the shape of its value for one token."""


class RowExamples(NamedTuple):
    """What a row of data gives, unless it is one example or bundle: independent ones, and the counters it adds to."""

    items: list[Any]  # `Example`s or `Bundle`s
    events: tuple[str, ...] = ()


class Pieces(NamedTuple):
    """What is left of an example or a bundle once it fits, and the counter that it adds to, or None."""

    items: list[Any]  # `Example`s of an example, at most one `Bundle` of a bundle
    event: Literal["truncated", "prompt_truncated", "dropped", "split"] | None


def fit(item: Example | Bundle, max_length: int, overlong: Overlong) -> Pieces:
    """Cut an example, or each example of a bundle, to at most `max_length` tokens.

    A piece without loss weight (the assistant's turns are beyond the cut) is left out: it would cost a forward pass and
    train nothing. An example of which nothing is left counts as dropped. A bundle stays whole: if nothing is left of
    one of its examples, or one is too long under "drop", the bundle is dropped. "split" is for examples alone.

    "keep_completion" cuts tokens from the left, as many from each example of a bundle, so that they keep one prompt.
    The last trained run of tokens (the completion, or the last answer of a conversation) stays whole, with at least one
    token before it, or the item is dropped. An earlier answer that the cut goes through is not trained.
    """
    if overlong == "keep_completion":
        return _fit_from_the_left(item, max_length)
    if isinstance(item, Example):
        return _fit_example(item, max_length, overlong)
    assert overlong != "split", "a bundle cannot be split"
    fitted = [_fit_example(example, max_length, overlong) for example in item]
    if not all(each.items for each in fitted):
        return Pieces([], "dropped")
    event = "truncated" if any(each.event for each in fitted) else None
    return Pieces([tuple(each.items[0] for each in fitted)], event)


def _fit_from_the_left(item: Example | Bundle, max_length: int) -> Pieces:
    cut = max(0, *(len(example.input_ids) - max_length for example in as_bundle(item)))
    kept = [_without_beginning(example, cut) for example in as_bundle(item)]
    fitted = [example for example in kept if example is not None and example.loss_weights.any()]
    if len(fitted) < len(kept):
        return Pieces([], "dropped")
    return Pieces([fitted[0] if isinstance(item, Example) else tuple(fitted)], "prompt_truncated" if cut else None)


def _without_beginning(example: Example, cut: int) -> Example | None:
    """Without the first `cut` tokens; None where that leaves nothing before the last trained run of tokens."""
    trained = np.flatnonzero(last_trained(example).loss_weights)
    if cut and (not len(trained) or cut >= trained[0]):
        return None
    piece = _piece(example, cut, len(example.input_ids))
    if cut and example.loss_weights[cut - 1]:
        weights = piece.loss_weights.copy()
        weights[: int(np.argmin(weights != 0))] = 0
        piece = piece._replace(loss_weights=weights)
    return _first_token_unweighted(piece)


def last_trained(example: Example) -> Example:
    """The example, trained on its last run of tokens with a weight alone."""
    trained = np.flatnonzero(example.loss_weights)
    gaps = np.flatnonzero(np.diff(trained) > 1)
    weights = example.loss_weights.copy()
    weights[: trained[gaps[-1] + 1] if len(gaps) else 0] = 0
    return example._replace(loss_weights=weights)


def weighed(example: Example, weight: float) -> Example:
    """The example with its loss weights times that of its row. Raises ValueError where they are too large."""
    with np.errstate(over="ignore"):
        weights = example.loss_weights * np.float32(weight)
    if not np.isfinite(weights).all():
        raise ValueError(f"the column 'weight' ({weight:g}) and the weights of its messages or tokens are too large")
    return example._replace(loss_weights=weights)


def trained_spans(weights: Array) -> list[tuple[int, int]]:
    """The places [start, stop) of each run of tokens with a weight."""
    edges = np.flatnonzero(np.diff((np.asarray(weights) > 0).astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _fit_example(example: Example, max_length: int, overlong: Literal["truncate", "drop", "split"]) -> Pieces:
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
    kept = [piece for piece in kept if np.count_nonzero(piece.loss_weights)]
    return Pieces(kept, event if kept else "dropped")


def as_bundle(item: Example | Bundle) -> Bundle:
    """An example alone is a bundle."""
    return (item,) if isinstance(item, Example) else item


def signal_types(item: Example | Bundle) -> SignalTypes:
    """The types of an item's signals. Raises ValueError where arrays differ in length, or examples in signals."""
    found: list[SignalTypes] = []
    for example in as_bundle(item):
        tokens = len(example.input_ids)
        for name, values in {"loss_weights": example.loss_weights, **example.signals}.items():
            if len(values) != tokens:
                raise ValueError(f"{name} has {len(values)} values for {tokens} tokens")
        found.append({name: (values.dtype, values.shape[1:]) for name, values in example.signals.items()})
    for types in found[1:]:
        if types != found[0]:
            raise signals_differ(types, found[0])
    return found[0]


def signals_differ(types: SignalTypes, expected: SignalTypes) -> ValueError:
    """The error for an example whose signals are not those of the others."""
    return ValueError(f"its signals are {_described(types)}, and those of other examples {_described(expected)}")


def _described(types: SignalTypes) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in sorted(types.items())) or "none"


class BestFit(Generic[Item]):
    """Online best-fit packing over a bounded number of open rows.

    An item goes into the fullest open row that has room for it, else into a new row. A row is handed out when it is
    full, or when it is the fullest and its place is needed. grain's packers hand out all their open rows as soon as one
    item fits none of them, so they need many times as many open rows for the same density, and the first batch comes
    later by the same factor (benchmarks/data.py).
    """

    def __init__(self, capacity: int, max_open: int, open_rows: Sequence[list[tuple[Item, int]]] = ()):
        """`max_open` 0 gives every item a separate row. `open_rows` are those of an earlier packer, in its order."""
        self._capacity, self._max_open = capacity, max_open
        self.open_rows = [[item for item, _ in row] for row in open_rows]  # fullest first
        self._room = [capacity - sum(size for _, size in row) for row in open_rows]  # ascending

    def add(self, item: Item, size: int) -> list[Item] | None:
        """Place an item. Returns the row that is handed out for it, if one is."""
        assert 0 < size <= self._capacity, size
        if self._max_open == 0 or size == self._capacity:
            return [item]
        at = bisect_left(self._room, size)
        if at < len(self._room):
            room, row = self._room.pop(at) - size, self.open_rows.pop(at)
            row.append(item)
            return row if room == 0 else self._open(row, room)
        handed_out = self.pop() if len(self.open_rows) == self._max_open else None
        self._open([item], self._capacity - size)
        return handed_out

    def pop(self) -> list[Item] | None:
        """The fullest open row; None when there is none."""
        if not self.open_rows:
            return None
        self._room.pop(0)
        return self.open_rows.pop(0)

    def _open(self, row: list[Item], room: int) -> None:
        at = bisect_left(self._room, room)
        self._room.insert(at, room)
        self.open_rows.insert(at, row)


def shared_prefix(bundle: Bundle) -> int:
    """The number of tokens without a weight that both examples of a pair begin with: their prompt. Each example has at
    least one token more. 0 for other bundles."""
    if len(bundle) != 2:
        return 0
    (one, other), (weights, others) = zip(*(example[:2] for example in bundle), strict=True)
    shorter = min(len(one), len(other)) - 1
    differs = (one[:shorter] != other[:shorter]) | (weights[:shorter] != 0) | (others[:shorter] != 0)
    return int(np.argmax(differs)) if differs.any() else shorter


def bundle_tokens(bundle: Bundle, share_prefixes: bool) -> int:
    """The tokens that a bundle takes in a row."""
    tokens = sum(len(example.input_ids) for example in bundle)
    return tokens - shared_prefix(bundle) if share_prefixes else tokens


class _Segment(NamedTuple):
    """A segment of a row. `first`: its first position; `prefix`: the number of segments back to the one it continues,
    or 0."""

    example: Example
    bundle: int
    first: int = 0
    prefix: int = 0


def _segments(number: int, bundle: Bundle, share_prefixes: bool) -> list[_Segment]:
    shared = shared_prefix(bundle) if share_prefixes else 0
    if not shared:
        return [_Segment(example, number) for example in bundle]
    rest = [_piece(example, shared, len(example.input_ids)) for example in bundle]
    continuing = [_Segment(example, number, shared, at) for at, example in enumerate(rest, 1)]
    return [_Segment(_piece(bundle[0], 0, shared), number), *continuing]


def make_row(
    items: Sequence[Example | Bundle],
    length: int,
    signals: SignalTypes | None = None,
    *,
    share_prefixes: bool = False,
) -> Batch:
    """Examples and bundles side by side as one row: a `Batch` whose arrays are [T]. No items make a row of padding.

    `signals` are the types of the items' signals; None: those of the first one. With `share_prefixes` the prompt of a
    pair is in the row once, as a segment that both answers continue.
    """
    segments = [
        segment
        for number, item in enumerate(items, 1)
        for segment in _segments(number, as_bundle(item), share_prefixes)
    ]
    examples = [segment.example for segment in segments]
    if signals is None:
        signals = signal_types(examples[0]) if examples else {}
    lengths = [len(example.input_ids) for example in examples]
    used = sum(lengths)
    starts = np.cumsum([0, *lengths])[:-1]
    tokens, positions, segment_ids, bundle_ids = np.zeros((4, length), np.int32)
    values = {name: np.zeros((length, *shape), dtype) for name, (dtype, shape) in signals.items()}
    row = Batch(tokens, positions, segment_ids, np.zeros(length, np.float32), values, bundle_ids)
    if share_prefixes:
        row = row._replace(prefix_ids=np.zeros(length, np.int32))
    if examples:
        bundles, first, back = (np.array(each) for each in zip(*(segment[1:] for segment in segments), strict=True))
        numbers = np.arange(1, len(examples) + 1)
        row.tokens[:used] = np.concatenate([example.input_ids for example in examples])
        row.loss_weights[:used] = np.concatenate([example.loss_weights for example in examples])
        row.segment_ids[:used] = np.repeat(numbers, lengths)
        bundle_ids[:used] = np.repeat(bundles, lengths)
        row.positions[:used] = np.arange(used) - np.repeat(starts - first, lengths)
        if row.prefix_ids is not None:
            row.prefix_ids[:used] = np.repeat(np.where(back > 0, numbers - back, 0), lengths)
        for name, array in values.items():
            array[:used] = np.concatenate([example.signals[name] for example in examples])
    return row


def num_examples(batch: Batch) -> np.ndarray:
    """Of each row of a batch: its segments, without those that others continue."""
    segments = np.asarray(batch.segment_ids).max(axis=1)
    if batch.prefix_ids is None:
        return segments
    prefix = np.asarray(batch.prefix_ids)
    return segments - np.count_nonzero((np.diff(prefix, axis=1, prepend=0) != 0) & (prefix > 0), axis=1)


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """Rows [T] into a batch [B, T]. All rows have the same arrays."""
    columns = [row.arrays() for row in rows]
    assert all(each.keys() == columns[0].keys() for each in columns), "the rows differ in their signals"
    return Batch.from_arrays({name: np.stack([each[name] for each in columns]) for name in columns[0]})


def _piece(example: Example, start: int, length: int) -> Example:
    part = slice(start, start + length)
    signals = {name: values[part] for name, values in example.signals.items()}
    return Example(example.input_ids[part], example.loss_weights[part], signals)


def _first_token_unweighted(example: Example) -> Example:
    # There is nothing before a segment's first token, so nothing predicts it.
    if not np.count_nonzero(example.loss_weights[:1]):
        return example
    weights = example.loss_weights.copy()
    weights[0] = 0
    return example._replace(loss_weights=weights)
