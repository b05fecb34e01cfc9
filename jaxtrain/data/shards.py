"""One virtual shard: draws -> rows of the files -> examples -> packed rows, with a state that resumes within a row."""

from __future__ import annotations

import logging
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

from jaxtrain.config import DataSection
from jaxtrain.data.mixing import Draw, Mixture
from jaxtrain.data.packing import BestFit, Pieces, SignalTypes, as_bundle, check_signals, fit, make_row, signal_types
from jaxtrain.data.sources import DataError, Row, Source
from jaxtrain.types import Batch, Bundle, Example

log = logging.getLogger(__name__)

Encode = Callable[[Row], Example | Bundle]
State = dict[str, Any]

COUNTERS = ("truncated", "dropped", "split", "bad_rows")  # rows of the files, counted when they are read

_CHUNK = 16  # rows that a worker thread takes at a time
_CHUNKS_AHEAD = 2
_ROWS_TRIED = 1000  # of a source, for one that makes an example
_SCAN_ROWS = 1024  # that are under way together when a source is searched


class _Key(NamedTuple):
    """Where a packed bundle comes from: all that a state holds of it."""

    source: int
    row: int
    piece: int


class _Read(NamedTuple):
    """The result of reading one row."""

    pieces: list[Bundle]
    event: str | None  # the counter it adds to


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
        self._data, self._encode = data, encode
        self._warned = False
        self._usable: set[int] = set()  # sources of which some row is known to give an example
        self.signals: SignalTypes | None = None  # while no row has been seen
        for source in sources if data.on_bad_row == "error" else []:
            source.make(0, self._fitted)
        if self.signals is None:
            self.signals = self._find_signals()

    def submit(self, executor: Executor, rows: list[tuple[int, int]]) -> Future[list[_Read | DataError]]:
        """`rows` are (source, row). An error is a result: it is raised in its turn, when the rows before it are out."""
        return executor.submit(lambda: [self._read(*row) for row in rows])

    def check_usable(self, source: int, executor: Executor) -> None:
        """Read a source from its beginning up to the first row that gives an example, once.

        Raises DataError with counts where no row does: such a source would be searched for ever.
        """
        if source in self._usable:
            return
        where, rows = self.sources[source].section.path, len(self.sources[source])
        log.warning("%s: many rows in a row give no example to train on; looking through all %d of them", where, rows)
        events: Counter[str] = Counter()
        for start in range(0, rows, _SCAN_ROWS):
            stop = min(start + _SCAN_ROWS, rows)
            chunks = [range(at, min(at + _CHUNK, stop)) for at in range(start, stop, _CHUNK)]
            for future in [self.submit(executor, [(source, row) for row in chunk]) for chunk in chunks]:
                for read in future.result():
                    if isinstance(read, DataError):
                        raise read
                    if read.pieces:
                        self._usable.add(source)
                        return
                    events[read.event or "dropped"] += 1
        counts = ", ".join(f"{name} {events[name]}" for name in COUNTERS)
        raise DataError(
            f"{where}: no row gives an example to train on: of {rows} rows, {counts}. Look at "
            f"data.max_length={self._data.max_length}, data.overlong={self._data.overlong}, "
            f"data.on_bad_row={self._data.on_bad_row} and data.loss_on={self._data.loss_on}"
        )

    def found(self, source: int) -> None:
        """Note that a row of a source gave an example."""
        self._usable.add(source)

    def _read(self, source: int, row: int) -> _Read | DataError:
        try:
            return _Read(*self.sources[source].make(row, self._fitted))
        except DataError as error:
            if self._data.on_bad_row == "error":
                return error
            self._warn(error)
            return _Read([], "bad_rows")

    def _fitted(self, row: Row) -> Pieces:
        item = self._encode(row)
        if len(as_bundle(item)) != self.bundle_size:
            raise ValueError(f"it makes {len(as_bundle(item))} examples where {self.bundle_size} are read together")
        types = signal_types(item)
        if self.signals is None:
            self.signals = types
        check_signals(types, self.signals)
        pieces = fit(item, self._data.max_length, self._data.overlong)
        return pieces._replace(items=[as_bundle(piece) for piece in pieces.items])

    def _find_signals(self) -> SignalTypes:
        """The signals of the first row that makes an example: rows of padding have them too."""
        for source in self.sources:
            for row in range(min(len(source), _ROWS_TRIED)):
                try:
                    source.make(row, self._fitted)
                except DataError:  # named or counted in its turn
                    continue
                assert self.signals is not None
                return self.signals
        return {}

    def _warn(self, error: DataError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"skipped a bad row, more are only counted: {error}", stacklevel=2)


class Shard:
    """Iterator over the packed rows of one virtual shard: `Batch` of arrays [T]."""

    def __init__(self, mixture: Mixture, reader: Reader, data: DataSection):
        self._mixture, self._reader = mixture, reader
        self._length = data.max_length * reader.bundle_size
        self._most_open = data.packing_bins if data.packing else 0
        start = {"counts": list(mixture.start), "piece": 0} | dict.fromkeys(COUNTERS, 0)
        self._restored: State = {"next": start, "open": []}
        self._examples: _Examples | None = None
        self._packer: BestFit[tuple[_Key, Bundle]] = BestFit(self._length, self._most_open)

    def state(self) -> State:
        """`next`: the row to read next, and the counters; `open`: where the examples in open rows come from."""
        if self._examples is None:
            return self._restored
        return {
            "next": self._examples.state,
            "open": [[list(key) for key, _ in row] for row in self._packer.open_rows],
        }

    def check(self, state: State) -> None:
        """Raises ValueError for the state of another number of sources."""
        sources = len(self._reader.sources)
        if len(state["next"]["counts"]) != sources:
            raise ValueError(
                f"the saved data state has {len(state['next']['counts'])} sources and data.train has {sources}: "
                "resume with the sources it was saved with"
            )

    def restore(self, state: State) -> None:
        """Go on from a state that was checked."""
        self._restored, self._examples = state, None

    def rows(self, executor: Executor) -> Iterator[Batch]:
        """The rows from here on; examples are read and encoded in `executor`."""
        self._packer = BestFit(self._length, self._most_open, self._reopened(executor))
        self._examples = _Examples(self._mixture, self._reader, executor, self._restored["next"])
        for keyed in self._examples:
            row = self._packer.add(keyed, _tokens(keyed[1]))
            if row is not None:
                yield self._row(row)
        while (row := self._packer.take()) is not None:
            yield self._row(row)

    def padding(self) -> Batch:
        """A row of padding, with the arrays of the others."""
        return make_row([], self._length, self._reader.signals)

    def _row(self, row: list[tuple[_Key, Bundle]]) -> Batch:
        return make_row([bundle for _, bundle in row], self._length, self._reader.signals)

    def _reopened(self, executor: Executor) -> list[list[tuple[tuple[_Key, Bundle], int]]]:
        """The open rows of the state, read again."""
        rows = [[_Key(*key) for key in row] for row in self._restored["open"]]
        futures = [self._reader.submit(executor, [key[:2] for key in row]) for row in rows]
        return [
            [_reread(*pair) for pair in zip(row, f.result(), strict=True)] for row, f in zip(rows, futures, strict=True)
        ]


def _reread(key: _Key, read: _Read | DataError) -> tuple[tuple[_Key, Bundle], int]:
    if isinstance(read, DataError):
        raise read
    if key.piece >= len(read.pieces):
        raise DataError(f"row {key.row} of source {key.source} is not what it was when the data state was saved")
    bundle = read.pieces[key.piece]
    return (key, bundle), _tokens(bundle)


def _tokens(bundle: Bundle) -> int:
    return sum(len(example.input_ids) for example in bundle)


class _Examples:
    """The bundles of a shard in the order of its mixture, read ahead."""

    def __init__(self, mixture: Mixture, reader: Reader, executor: Executor, state: State):
        self._mixture, self._reader, self._executor = mixture, reader, executor
        self.state = state  # after the last example; replaced and never changed, since batches under way hold it
        self._drawn = tuple(state["counts"])
        self._ahead: deque[tuple[list[Draw], Future[list[_Read | DataError]]]] = deque()

    def __iter__(self) -> Iterator[tuple[_Key, Bundle]]:
        first_piece = self.state["piece"]
        fruitless = [0] * len(self._reader.sources)  # rows of each source since the last that gave an example
        for draw, read in self._reads():
            after = self.state | {"counts": list(draw.counts), "piece": 0}
            if read.event is not None:
                after[read.event] += 1
            for piece in range(first_piece, len(read.pieces)):
                self.state = self.state | {"piece": piece + 1} if piece + 1 < len(read.pieces) else after
                yield _Key(draw.source, draw.row, piece), read.pieces[piece]
            if read.pieces:
                self._reader.found(draw.source)
                fruitless = [0 if source == draw.source else count for source, count in enumerate(fruitless)]
            else:
                fruitless[draw.source] += 1
                if fruitless[draw.source] == self._mixture.share(draw.source):
                    self._reader.check_usable(draw.source, self._executor)
                if self._mixture.repeats and min(fruitless) > self._mixture.total_rows:
                    raise DataError(_nothing_left(after))
            self.state, first_piece = after, 0

    def _reads(self) -> Iterator[tuple[Draw, _Read]]:
        while self._read_ahead():
            draws, future = self._ahead.popleft()
            for draw, read in zip(draws, future.result(), strict=True):
                if isinstance(read, DataError):
                    raise read
                yield draw, read

    def _read_ahead(self) -> bool:
        """Keep the threads busy. False when nothing is left."""
        while len(self._ahead) < _CHUNKS_AHEAD and (draws := self._draw()):
            self._ahead.append((draws, self._reader.submit(self._executor, [draw[:2] for draw in draws])))
        return bool(self._ahead)

    def _draw(self) -> list[Draw]:
        draws: list[Draw] = []
        while len(draws) < _CHUNK and (draw := self._mixture.draw(self._drawn)) is not None:
            self._drawn = draw.counts
            draws.append(draw)
        return draws


def _nothing_left(state: State) -> str:
    counts = ", ".join(f"{name} {state[name]}" for name in COUNTERS)
    return (
        "no row gives an example to train on among those that one virtual shard draws, which with data.shuffle=false "
        f"are the same in every epoch ({counts}): look at data.on_bad_row, data.max_length and data.virtual_shards"
    )
