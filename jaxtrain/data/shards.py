"""One virtual shard: draws -> rows of the files -> examples -> packed rows, with a state that resumes within a row."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple, NoReturn

from jaxtrain.config import DataSection
from jaxtrain.data.encode_pool import EncodePool, encode_rows
from jaxtrain.data.encoder import RowEncoder
from jaxtrain.data.mixing import Draw, Mixture
from jaxtrain.data.packing import (
    BestFit,
    RowExamples,
    SignalTypes,
    as_bundle,
    bundle_tokens,
    fit,
    make_row,
    signal_types,
    signals_differ,
)
from jaxtrain.data.sources import DataError, Row, Source, StreamEndError
from jaxtrain.types import Batch, Bundle, Example

log = logging.getLogger(__name__)

Encode = Callable[[Row], Example | Bundle | RowExamples]
State = dict[str, Any]

# Rows of the files, counted when they are read.
COUNTERS = (
    *("truncated", "dropped", "split", "prompt_truncated", "bad_rows", "thoughts_left_out", "equal_pairs"),
    *("thoughts_moved", "arguments_unread", "nulls_left_out"),
)

_CHUNK = 16  # rows that a worker thread takes at a time
_CHUNKS_AHEAD = 2  # that a shard asks for
_ROWS_TRIED = 1000  # of a source, for one that makes an example
_ERRORS_NAMED = 3  # of a source of which no row makes one
_SCAN_ROWS = 1024  # that are under way together when a source is searched


class _Key(NamedTuple):
    """Where a packed bundle comes from: all that a state holds of it."""

    source: int
    row: int
    piece: int


_PAST_END = RowExamples([])  # there is no row: the stream has ended before it


class Reader:
    """Rows by number -> bundles that fit, in the threads of an executor."""

    def __init__(self, sources: list[Source], data: DataSection, encode: Encode, bundle_size: int = 1):
        """Tries the first row of every source, unless bad rows are skipped.

        `encode` returns an example, or a bundle of `bundle_size` of them. Raises DataError where the first row of a
        source cannot be trained on, and ValueError where bundles would be split.
        """
        if bundle_size > 1 and data.overlong == "split":
            raise ValueError("data.overlong=split would cut examples apart that are read together: truncate or drop")
        self.sources, self.bundle_size = sources, bundle_size
        self.share_prefixes = False  # whether the prompt of a pair is in a row once
        self._data, self._encode = data, encode
        self.pool: EncodePool | None = None  # where rows are encoded by `submit`; None: in its threads
        self.chunk_rows, self.chunks_ahead = _CHUNK, _CHUNKS_AHEAD  # of a shard
        self._has_more = isinstance(encode, RowEncoder) and type(encode).more_columns is not RowEncoder.more_columns
        self._warned = False
        self.usable: set[int] = set()  # sources of which some row is known to give an example
        self.signals: SignalTypes | None = None  # while no row has been seen
        for source in sources if data.on_bad_row == "error" else []:
            self._make(source, 0)
        if self.signals is None:
            self.signals = self._find_signals()

    def submit(self, executor: Executor, rows: list[tuple[int, int]]) -> Future[list[RowExamples | DataError]]:
        """`rows` are (source, row). An error is a result: it is raised in order, when the rows before it are out."""
        return executor.submit(self._read, rows)

    def check_usable(self, source: int, executor: Executor) -> None:
        """Read a source from its beginning up to the first row that gives an example, once.

        Raises DataError with counts where no row does: such a source would be searched endlessly.
        """
        if source in self.usable:
            return
        where = self.sources[source].section.path
        log.warning("%s: many rows in a row give no example to train on; looking through all of them", where)
        events: Counter[str] = Counter()
        indices = self.sources[source].indices()
        while scanned := list(itertools.islice(indices, _SCAN_ROWS)):
            chunks = [scanned[at : at + _CHUNK] for at in range(0, len(scanned), _CHUNK)]
            for future in [self.submit(executor, [(source, row) for row in chunk]) for chunk in chunks]:
                for read in future.result():
                    if isinstance(read, DataError):
                        raise read
                    if read.items:
                        self.usable.add(source)
                        return
                    if read is not _PAST_END:
                        events.update(read.events or ("dropped",))
        self.raise_useless(source, events)

    def raise_useless(self, source: int, events: Counter[str]) -> NoReturn:
        """Raise DataError for a source of which no row gives an example. `events` are the counters of all its rows."""
        counts, rows = ", ".join(f"{name} {events[name]}" for name in COUNTERS), len(self.sources[source])
        what = f"{self.sources[source].section.path}: no row gives an example to train on: of {rows} rows, {counts}."
        if events["bad_rows"] < rows:
            what += f" Look at data.max_length={self._data.max_length} and data.overlong={self._data.overlong}."
        if events["bad_rows"]:
            what += " What is refused first:" + "".join(f"\n  {error}" for error in self._first_errors(source))
        raise DataError(what)

    def _first_errors(self, source: int) -> list[DataError]:
        """Of rows of a source that cannot be trained on."""
        found: list[DataError] = []
        for row in itertools.islice(self.sources[source].indices(), _ROWS_TRIED):
            try:
                self._make(self.sources[source], row)
            except DataError as error:
                found.append(error)
            except StreamEndError:
                break
            if len(found) == _ERRORS_NAMED:
                break
        return found

    def _read(self, places: list[tuple[int, int]]) -> list[RowExamples | DataError]:
        found = []
        for source, row in places:
            try:
                columns, events = self.sources[source].read(row)
                whole = self._with_more(columns, source, row) if self._has_more else columns
                found.append((columns, events, whole))
            except (DataError, StreamEndError) as error:
                found.append(({}, (), error))
        rows = [whole for _, _, whole in found if isinstance(whole, dict)]
        made = iter(encode_rows(self._encode, rows) if self.pool is None else self.pool(rows))
        return [
            self._result(columns, next(made) if isinstance(whole, dict) else whole, self.sources[source], row, events)
            for (source, row), (columns, events, whole) in zip(places, found, strict=True)
        ]

    def _with_more(self, columns: Row, number: int, row: int) -> Row:
        """A row's columns with further ones, which may be in other rows. Raises DataError."""
        assert isinstance(self._encode, RowEncoder)
        source = self.sources[number]
        try:
            return columns | self._encode.more_columns(source, row)
        except ValueError as error:
            raise error if isinstance(error, DataError) else DataError(f"{source.place(row)}: {error}") from error

    def _result(
        self, columns: Row, made: Any, source: Source, row: int, events: tuple[str, ...]
    ) -> RowExamples | DataError:
        """`events`: the counters that reading the row adds to."""
        if isinstance(made, StreamEndError):
            return _PAST_END
        try:
            if isinstance(made, ValueError):
                raise made
            fitted = self._fitted(columns, made, source)
            return fitted._replace(events=tuple(sorted({*fitted.events, *events}))) if events else fitted
        except ValueError as error:
            named = error if isinstance(error, DataError) else DataError(f"{source.place(row)}: {error}")
            if self._data.on_bad_row == "error":
                return named
            self._warn(named)
            return RowExamples([], ("bad_rows",))

    def _make(self, source: Source, row: int) -> RowExamples:
        def encoded(columns: Row) -> RowExamples:
            more = self._encode.more_columns(source, row) if isinstance(self._encode, RowEncoder) else {}
            return self._fitted(columns, self._encode(columns | more), source)

        return source.make(row, encoded)

    def _fitted(self, columns: Row, made: Example | Bundle | RowExamples, source: Source) -> RowExamples:
        if isinstance(self._encode, RowEncoder):  # a custom function may read any column
            self._encode.note_ignored(columns, source)
        items, counted = made if isinstance(made, RowExamples) else ([made], ())
        pieces, events = [], set(counted)
        for item in items:
            if len(as_bundle(item)) != self.bundle_size:
                raise ValueError(f"it makes {len(as_bundle(item))} examples where {self.bundle_size} are read together")
            types = signal_types(item)
            if self.signals is None:
                self.signals = types
            if types != self.signals:
                raise signals_differ(types, self.signals)
            fitted = fit(item, self._data.max_length, self._data.overlong)
            pieces += [as_bundle(piece) for piece in fitted.items]
            if fitted.event is not None:
                events.add(fitted.event)
        return RowExamples(pieces, tuple(sorted(events)))

    def _find_signals(self) -> SignalTypes:
        """The signals of the first row that makes an example: rows of padding have them too."""
        for source in self.sources:
            for row in itertools.islice(source.indices(), _ROWS_TRIED):
                try:
                    self._make(source, row)
                except (DataError, StreamEndError):  # named or counted when it is read
                    continue
                if self.signals is not None:
                    return self.signals
        return {}

    def _warn(self, error: DataError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"skipped a bad row; further ones are counted but not reported: {error}", stacklevel=2)


class Shard:
    """Iterator over the packed rows of one virtual shard: `Batch` of arrays [T]."""

    def __init__(self, mixture: Mixture, reader: Reader, data: DataSection):
        self._mixture, self._reader = mixture, reader
        self._length = data.tokens_per_row(reader.bundle_size)
        self._most_open = data.packing_bins if data.packing else 0
        start = {"counts": list(mixture.start), "piece": 0} | dict.fromkeys(COUNTERS, 0)
        self._restored: State = {"next": start, "open": []}
        self._examples: _Examples | None = None
        self._packer: BestFit[tuple[_Key, Bundle]] = BestFit(self._length, self._most_open)

    def state(self) -> State:
        """`next`: the row to read next, and the counters; `open`: where the examples in open rows come from."""
        return self.snapshot()()

    def snapshot(self) -> Callable[[], State]:
        """A function that gives the state as it is now. There is one of every batch, and few are ever asked for."""
        if self._examples is None:
            restored = self._restored
            return lambda: restored
        following, rows = self._examples.state, [(row, len(row)) for row in self._packer.open_rows]  # rows only grow
        return lambda: {
            "next": following,
            "open": [[list(key) for key, _ in row[:count]] for row, count in rows],
        }

    def check(self, state: State) -> None:
        """Raises ValueError for the state of another number of sources."""
        sources = len(self._reader.sources)
        if len(state["next"]["counts"]) != sources:
            raise ValueError(
                f"the saved data state has {len(state['next']['counts'])} sources and data.train has {sources}: "
                "resume with the sources it was saved with"
            )

    def to_read(self, source: int) -> tuple[int, list[int]]:
        """How many rows of a source were drawn before those that are read next, and the rows that are read again."""
        state = self._restored
        return state["next"]["counts"][source], [row for keys in state["open"] for of, row, _ in keys if of == source]

    def restore(self, state: State) -> None:
        """Go on from a state that was checked."""
        counted = dict.fromkeys(COUNTERS, 0) | state["next"]  # one that an earlier version did not know is 0
        self._restored, self._examples = state | {"next": counted}, None

    def rows(self, executor: Executor) -> Iterator[Batch]:
        """The rows from here on; examples are read and encoded in `executor`."""
        self._packer = BestFit(self._length, self._most_open, self._reopened(executor))
        self._examples = _Examples(self._mixture, self._reader, executor, self._restored["next"])
        for keyed in self._examples:
            row = self._packer.add(keyed, bundle_tokens(keyed[1], self._reader.share_prefixes))
            if row is not None:
                yield self._row(row)
        while (row := self._packer.take()) is not None:
            yield self._row(row)

    def padding(self) -> Batch:
        """A row of padding, with the arrays of the others."""
        return self._row([])

    def _row(self, row: list[tuple[_Key, Bundle]]) -> Batch:
        bundles, reader = [bundle for _, bundle in row], self._reader
        return make_row(bundles, self._length, reader.signals, share_prefixes=reader.share_prefixes)

    def _reopened(self, executor: Executor) -> list[list[tuple[tuple[_Key, Bundle], int]]]:
        """The open rows of the state, read again."""
        rows = [[_Key(*key) for key in row] for row in self._restored["open"]]
        futures = [self._reader.submit(executor, [(key.source, key.row) for key in row]) for row in rows]
        return [
            [self._reread(*pair) for pair in zip(row, f.result(), strict=True)]
            for row, f in zip(rows, futures, strict=True)
        ]

    def _reread(self, key: _Key, read: RowExamples | DataError) -> tuple[tuple[_Key, Bundle], int]:
        if isinstance(read, DataError):
            raise read
        if key.piece >= len(read.items):
            raise DataError(f"row {key.row} of source {key.source} is not what it was when the data state was saved")
        bundle = read.items[key.piece]
        return (key, bundle), bundle_tokens(bundle, self._reader.share_prefixes)


class _Examples:
    """The bundles of a shard in the order of its mixture, read ahead."""

    def __init__(self, mixture: Mixture, reader: Reader, executor: Executor, state: State):
        self._mixture, self._reader, self._executor = mixture, reader, executor
        self.state: State = state  # after the last example; replaced and never changed, since batches under way hold it

    def __iter__(self) -> Iterator[tuple[_Key, Bundle]]:
        first_piece = self.state["piece"]
        without_example = [0] * len(self._reader.sources)  # rows of each source since the last that gave an example
        past_end = [0] * len(self._reader.sources)  # draws of each stream after its end, which are no rows
        for draw, read in self._reads():
            if read is _PAST_END:
                past_end[draw.source] += 1
                continue
            counts = [drawn - none for drawn, none in zip(draw.counts, past_end, strict=True)]
            after = self.state | {"counts": counts, "piece": 0}
            after |= {event: after[event] + 1 for event in read.events}
            for piece in range(first_piece, len(read.items)):
                self.state = self.state | {"piece": piece + 1} if piece + 1 < len(read.items) else after
                yield _Key(draw.source, draw.row, piece), read.items[piece]
            if read.items:
                self._reader.usable.add(draw.source)
                without_example = [
                    0 if source == draw.source else count for source, count in enumerate(without_example)
                ]
            else:
                without_example[draw.source] += 1
                if without_example[draw.source] == self._mixture.share(draw.source):
                    self._reader.check_usable(draw.source, self._executor)
                if self._mixture.repeats and min(without_example) > self._mixture.total_rows:
                    raise DataError(_nothing_left(after))
            self.state, first_piece = after, 0

    def _reads(self) -> Iterator[tuple[Draw, RowExamples]]:
        counts = tuple(self.state["counts"])
        ahead: deque[tuple[list[Draw], Future[list[RowExamples | DataError]]]] = deque()
        while True:
            while len(ahead) < self._reader.chunks_ahead:
                chunk: list[Draw] = []
                while len(chunk) < self._reader.chunk_rows and (draw := self._mixture.draw(counts)) is not None:
                    counts = draw.counts
                    chunk.append(draw)
                ahead.append((chunk, self._reader.submit(self._executor, [(draw.source, draw.row) for draw in chunk])))
            chunk, future = ahead.popleft()
            if not chunk:
                return
            for draw, read in zip(chunk, future.result(), strict=True):
                if isinstance(read, DataError):
                    raise read
                yield draw, read


def _nothing_left(state: State) -> str:
    counts = ", ".join(f"{name} {state[name]}" for name in COUNTERS)
    return (
        "no row gives an example to train on among those that one virtual shard draws, which with data.shuffle=false "
        f"are the same in every epoch ({counts}): look at data.on_bad_row, data.max_length and data.virtual_shards"
    )
