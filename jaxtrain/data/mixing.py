"""The order of rows: shuffled epochs, weighted mixtures, virtual shards. Pure functions of the counts drawn so far.

Each source is one long sequence: its epochs in turn, each in its own order. Virtual shard `v` of `V` owns the places
v, v + V, v + 2V, ... of that sequence. So each row is drawn exactly once per epoch for any number of hosts, also from
sources with fewer rows than there are shards, and a shard's only state is the number of rows drawn from each source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from grain.experimental import index_shuffle

from jaxtrain.data.sources import ENDLESS, Source

_WINDOW = 12  # blocks of all sources that are open together, 8 MiB each: less than half of what the cache holds
_STREAM_SHARE = 1 << 16  # rows without an example after which a source is searched for one, at most
_ROUNDS = 4  # of the block cipher behind index_shuffle; grain's own default
# Rows up to which a table is used: the cipher permutes at least 2**16 numbers and is repeated until it gives a row,
# which takes long where rows are few.
_TABLE = 1 << 14


class Draw(NamedTuple):
    """One row of one source, and the state after it."""

    source: int
    row: int
    counts: tuple[int, ...]  # rows drawn from every source, this one included


class Mixture:
    """The order in which one virtual shard draws the rows of its sources.

    The next row comes from the source whose share is furthest behind (stride scheduling), so that counts follow the
    weights within one row. The offset of a source within its stride is random per shard: otherwise all shards would
    draw from the same source at the same time. An exhausted source is skipped and the others continue.
    """

    def __init__(
        self, sources: Sequence[Source], *, seed: int, shuffle: bool | Literal["blocks"], shard: int, num_shards: int
    ):
        self._sources = sources
        self._weights = [source.section.weight for source in sources]
        # The end of a stream is not known until it is reached.
        self._ends: list[int | None] = [
            None if source.stream is not None or not source.section.epochs else source.section.epochs * len(source)
            for source in sources
        ]
        self._offsets = np.random.default_rng([seed, shard]).random(len(sources)).tolist()
        self._seed, self._shuffle, self._shard, self._num_shards = seed, shuffle, shard, num_shards
        self._blocks = [
            _Blocks(source, max(_WINDOW // len(sources), 1)) if shuffle == "blocks" and source.stream is None else None
            for source in sources
        ]

    @property
    def start(self) -> tuple[int, ...]:
        return (0,) * len(self._sources)

    @property
    def finite(self) -> bool:
        """Whether every source ends after a known number of rows."""
        return None not in self._ends

    @property
    def rows(self) -> int:
        """Rows that all shards draw together, of finite sources."""
        return sum(end for end in self._ends if end is not None)

    @property
    def epoch_rows(self) -> float:
        """Rows of an epoch of the mixture: it lasts until every source, drawn by its weight, was passed over once, so
        that smaller or heavier sources are drawn more than once in it; infinite while the end of a stream was not seen.
        """
        total = sum(self._weights)
        if any(len(source) == ENDLESS for source in self._sources):
            return math.inf
        return max(len(source) * total / weight for source, weight in zip(self._sources, self._weights, strict=True))

    @property
    def has_streams(self) -> bool:
        """Whether a source is a stream, whose rows cannot be counted in advance."""
        return any(source.stream is not None for source in self._sources)

    def check_length(self, steps: int | None) -> None:
        """Raises ValueError where a source is a stream and `train.steps` does not say how long the run is."""
        for source in self._sources if steps is None else ():
            if source.stream is not None:
                raise ValueError(
                    f"the length of {source.section.path} is not known, since it is a stream: give train.steps, and no "
                    "train.epochs"
                )

    def end_after(self, epochs: float) -> None:
        """End every source where `epochs` epochs of the mixture do. Raises ValueError for a stream."""
        self.check_length(None)
        rows, total = epochs * self.epoch_rows, sum(self._weights)
        # Rounded first: 30 rows times a share of 1/3 may be 10 and a bit.
        self._ends = [math.ceil(round(rows * weight / total, 6)) for weight in self._weights]

    @property
    def total_rows(self) -> int:
        return sum(map(len, self._sources))

    def share(self, source: int) -> int:
        """Rows of an epoch of a source that every shard draws, at least; 1 where there are fewer rows than shards."""
        return min(max(len(self._sources[source]) // self._num_shards, 1), _STREAM_SHARE)

    @property
    def repeats(self) -> bool:
        """Whether a shard draws the same rows in every epoch."""
        return not self._shuffle

    def draw(self, counts: tuple[int, ...]) -> Draw | None:
        """The draw after `counts` rows from each source; None when every source is exhausted."""
        places = [self._shard + count * self._num_shards for count in counts]  # in the sources' sequences of epochs
        live = []
        for source, rows in enumerate(self._sources):
            # The length of a stream is found when it ends, so it is asked for at every draw.
            end = self._ends[source] if rows.stream is None else len(rows)
            if end is None or places[source] < end:
                live.append(source)
        if not live:
            return None
        source = min([((counts[s] + self._offsets[s]) / self._weights[s], s) for s in live])[1]
        rows = self._sources[source]
        epoch, row = divmod(places[source], len(rows))
        if (blocks := self._blocks[source]) is not None:
            row = blocks.row(row, self._seed, source, epoch)
        elif self._shuffle and rows.stream is None:
            row = _order(len(rows), self._seed, source, epoch)(row)
        return Draw(source, row, tuple(count + (s == source) for s, count in enumerate(counts)))


class _Blocks:
    """An order in which neighbours come from few blocks: the blocks are shuffled, and then the rows of each window of
    so many blocks. Reading it takes each block into memory once an epoch."""

    def __init__(self, source: Source, window: int):
        self._source, ends = source, source.block_ends()
        self._starts, self._sizes = np.concatenate([[0], ends[:-1]]), np.diff(ends, prepend=0)
        self._window = window
        self._epoch: tuple[int, ...] | None = None
        self._order = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def row(self, place: int, *seed: int) -> int:
        if seed != self._epoch:
            self._epoch, self._order = seed, self._begin(seed)
        blocks, ends = self._order
        first = int(np.searchsorted(ends[self._window - 1 :: self._window], place, side="right")) * self._window
        last = min(first + self._window, len(blocks)) - 1
        begin = int(ends[first - 1]) if first else 0
        within = begin + _order(int(ends[last]) - begin, *seed, first)(place - begin)
        block = int(np.searchsorted(ends, within, side="right"))
        return int(self._starts[blocks[block]]) + within - (int(ends[block - 1]) if block else 0)

    def _begin(self, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The blocks [blocks] in their order, and the numbers of rows [blocks] up to the end of each."""
        blocks = np.random.default_rng(seed).permutation(len(self._starts))
        self._source.read_together(np.split(blocks, range(self._window, len(blocks), self._window)))
        return blocks, np.cumsum(self._sizes[blocks])


@lru_cache(maxsize=128)
def _order(rows: int, *seed: int) -> Callable[[int], int]:
    """A permutation of `rows` numbers: a table where they are few, else a block cipher, which needs no memory."""
    if rows <= _TABLE:
        return np.random.default_rng(seed).permutation(rows).tolist().__getitem__
    key = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return lambda place: index_shuffle(place, max_index=rows - 1, seed=key, rounds=_ROUNDS)
