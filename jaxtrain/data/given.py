"""Rows given by a program: a list, or what a function named by its import path returns.

A sequence, a grain `MapDataset` among them, has access by index and so our order. An iterable, a grain `IterDataset`
among them, is a stream: it is read once, in its own order. Element i goes to the virtual shard i % shards, so the order
does not depend on the number of hosts, each of which iterates over all of it. A run resumes by iterating again from the
beginning up to where it was, which is exact as long as the function gives the same elements again.
"""

import copy
import hashlib
import inspect
import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from jaxtrain.config.python_values import plain_row
from jaxtrain.data.columns import Row
from jaxtrain.data.files.errors import DataError
from jaxtrain.data.files.rows import Rows
from jaxtrain.named import load_named

ENDLESS = sys.maxsize  # the length of a stream until its end was seen; grain uses this value for `repeat()`
_DIGEST_ROWS = 16


class StreamEndError(Exception):
    """A stream has fewer rows than the one that was asked for."""


class SequenceRows:
    """Rows of an object with access by index."""

    types: Mapping[str, pa.DataType] = {}
    block_bytes = 0

    def __init__(self, name: str, rows: Any, limit: int | None):
        self._name, self._rows = name, rows
        if len(rows) == ENDLESS:
            raise DataError(f"{name}: the data set is endless: leave `repeat` out, since sources repeat by themselves")
        self._count = len(rows) if limit is None else min(len(rows), limit)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        return _plain(self._rows[index], self.place(index))

    @property
    def block_ends(self) -> np.ndarray:
        return np.array([self._count])

    def place(self, index: int) -> str:
        return f"{self._name}:row {index + 1}"

    def digest(self) -> str:
        """Of rows spread over the sequence, the first and the last among them."""
        last = self._count - 1
        places = sorted({last * number // (_DIGEST_ROWS - 1) for number in range(_DIGEST_ROWS)}) if last >= 0 else []
        return _digest([self._rows[place] for place in places])


class GivenRows(SequenceRows):
    """Rows of a config, which are plain already."""

    def __getitem__(self, index: int) -> Row:
        return copy.deepcopy(self._rows[index])  # as a file does: whoever reads a row may change it


class StreamRows:
    """Rows of an iterable by index, each read once and about in order, as shards do.

    Rows that were passed over are held until they are read; a row that was passed over and not held is reached by
    iterating again from the beginning.
    """

    types: Mapping[str, pa.DataType] = {}
    block_bytes = 0

    def __init__(self, name: str, make: Callable[[], Iterable[Any]], limit: int | None):
        self._name, self._make, self._limit = name, make, limit
        self._lock = threading.Lock()
        self._length = ENDLESS
        self.expect({0: 0}, 1, ())
        self._restart()
        self._first = next(self._iterator, _END)  # kept, since it is looked at before the stream is read
        if self._first is _END:
            self._length = 0
        self._next = 1

    def __len__(self) -> int:
        return self._length

    def expect(self, following: Mapping[int, int], shards: int, again: Iterable[int]) -> None:
        """Which rows will be read, and so are held: of each virtual shard here those from its `following` row on, and
        those that are read `again`."""
        with self._lock:
            self._following, self._shards, self._again = dict(following), shards, set(again)
            self._held: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Row:
        """Raises StreamEndError where the stream ends before this row."""
        with self._lock:
            if 0 < index < self._next and index not in self._held:
                self._restart()
            while self._next <= index:
                self._advance(index)
            row = self._held.pop(index) if index else self._first
            self._again.discard(index)
            shard = index % self._shards
            if shard in self._following:
                self._following[shard] = max(self._following[shard], index + 1)
        return _plain(row, self.place(index))

    @property
    def block_ends(self) -> np.ndarray:
        return np.array([self._length])

    def place(self, index: int) -> str:
        return f"{self._name}:row {index + 1}"

    def digest(self) -> str:
        """Of the first row."""
        return _digest([self._first])

    def _restart(self) -> None:
        self._iterator: Iterator[Any] = iter(self._make())
        self._next = 0  # the row that the iterator gives next
        self._held = {}

    def _advance(self, wanted: int) -> None:
        if self._next == self._limit or (row := next(self._iterator, _END)) is _END:
            self._length = self._next
            raise StreamEndError
        following = self._following.get(self._next % self._shards, ENDLESS) if self._next else ENDLESS
        if self._next in (wanted, *self._again) or self._next >= following:
            self._held[self._next] = row
        self._next += 1


def given_rows(name: str, path: Any, args: Mapping[str, Any], limit: int | None) -> Rows:
    """The rows that the function `path` returns for `args`. Raises DataError for what is neither of the two kinds."""
    function = load_named(path, "data: source")
    if not callable(function):
        raise DataError(f"{name} must be a function that returns rows, not {type(function).__name__}")
    make: Callable[..., Any] = function
    try:
        inspect.signature(make).bind(**args)
    except TypeError as error:
        raise DataError(f"{name} cannot be called with the `args` {dict(args)}: {error}") from None
    except ValueError:  # one in C that does not show its arguments
        pass
    found = make(**args)
    if isinstance(found, Sequence) or (hasattr(found, "__getitem__") and hasattr(found, "__len__")):
        if isinstance(found, str | bytes | Mapping):
            raise DataError(f"{name} returned {type(found).__name__}, and not rows")
        return SequenceRows(name, found, limit)
    if not isinstance(found, Iterable):
        raise DataError(
            f"{name} returned {type(found).__name__}: it must be a sequence, a grain MapDataset or IterDataset, or an "
            "iterable of rows"
        )
    first = [found]  # what was returned is used first; a restart asks for another
    return StreamRows(name, lambda: first.pop() if first else make(**args), limit)


_END = object()


def _plain(row: Any, place: str) -> Row:
    try:
        return plain_row(row, place)
    except ValueError as error:
        gap = "; a grain data set with `filter` has gaps and no access by index" if row is None else ""
        raise DataError(f"{error}{gap}") from None


def _fault_or_plain(row: Any) -> Row | str:
    """A row that cannot be read, which names its place when it is, is part of the data as well."""
    try:
        return _plain(row, "row")
    except DataError as error:
        return str(error)


def _digest(rows: list[Any]) -> str:
    text = json.dumps([_fault_or_plain(row) for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
