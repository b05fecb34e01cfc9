"""The order of rows: shuffled epochs, weighted mixtures, virtual shards. Pure functions of the counts drawn so far.

Each source is one long sequence: its epochs in turn, each in its own order. Virtual shard `v` of `V` owns the places
v, v + V, v + 2V, ... of that sequence. So each row is drawn exactly once per epoch for any number of hosts, also from
sources with fewer rows than there are shards, and a shard's only state is the number of rows drawn from each source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from grain.experimental import index_shuffle

from jaxtrain.data.sources import Source

_ROUNDS = 4  # of the block cipher behind index_shuffle; grain's own default
_TABLE = 1 << 14  # rows; the cipher works on blocks of 2**16 and walks on until it hits a row, long where rows are few


class Draw(NamedTuple):
    """One row of one source, and the state after it."""

    source: int
    row: int
    counts: tuple[int, ...]  # rows drawn from every source, this one included


class Mixture:
    """The order in which one virtual shard draws the rows of its sources.

    The next row comes from the source whose share is furthest behind (stride scheduling), so that counts follow the
    weights within one row. The offset of a source within its stride is random per shard: otherwise all shards would
    draw from the same source at the same time. An exhausted source is left out and the others continue.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, shuffle: bool, shard: int, num_shards: int):
        self._lengths = [len(source) for source in sources]
        self._epochs = [source.section.epochs for source in sources]
        self._weights = [source.section.weight for source in sources]
        self._offsets = np.random.default_rng([seed, shard]).random(len(sources)).tolist()
        self._seed, self._shuffle, self._shard, self._num_shards = seed, shuffle, shard, num_shards

    @property
    def start(self) -> tuple[int, ...]:
        return (0,) * len(self._lengths)

    @property
    def total_rows(self) -> int:
        return sum(self._lengths)

    def share(self, source: int) -> int:
        """Rows of an epoch of a source that every shard draws, at least; 1 where there are fewer rows than shards."""
        return max(self._lengths[source] // self._num_shards, 1)

    @property
    def repeats(self) -> bool:
        """Whether a shard draws the same rows in every epoch."""
        return not self._shuffle

    def draw(self, counts: tuple[int, ...]) -> Draw | None:
        """The draw after `counts` rows from each source; None when every source is exhausted."""
        live = [source for source in range(len(counts)) if not self._exhausted(source, counts[source])]
        if not live:
            return None
        source = min(live, key=lambda s: (counts[s] + self._offsets[s]) / self._weights[s])
        epoch, place = divmod(self._place(counts[source]), self._lengths[source])
        after = tuple(count + (s == source) for s, count in enumerate(counts))
        return Draw(source, self._row(source, epoch, place), after)

    def _place(self, count: int) -> int:
        return self._shard + count * self._num_shards

    def _exhausted(self, source: int, count: int) -> bool:
        epochs = self._epochs[source]
        return epochs is not None and self._place(count) >= epochs * self._lengths[source]

    def _row(self, source: int, epoch: int, place: int) -> int:
        if not self._shuffle:
            return place
        return _order(self._lengths[source], self._seed, source, epoch)(place)


@lru_cache(maxsize=128)
def _order(rows: int, *seed: int) -> Callable[[int], int]:
    """A permutation of `rows` numbers: a table where they are few, else a block cipher, which needs no memory."""
    if rows <= _TABLE:
        return np.random.default_rng(seed).permutation(rows).tolist().__getitem__
    key = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return lambda place: index_shuffle(place, max_index=rows - 1, seed=key, rounds=_ROUNDS)
