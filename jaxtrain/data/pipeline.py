"""The stream of packed batches, made ahead of the training step.

Each virtual shard is a stream with its own state. A host reads some of them and stacks their rows, so the global batch
does not depend on which host reads which shard, and a checkpoint restores onto any number of hosts.

A producer thread packs; `data.workers` threads read and tokenise for it, or `data.processes` worker processes tokenise.
Each batch is queued together with the state after it, so the state that is saved is that of the last batch handed out,
however far ahead the threads are.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.encode_pool import EncodePool
from jaxtrain.data.files.read_cache import CACHE_BYTES
from jaxtrain.data.fingerprints import check_unchanged, fingerprints
from jaxtrain.data.lengths import Count, Lengths, count_steps, source_lengths
from jaxtrain.data.mixing import Mixture
from jaxtrain.data.packing import num_examples, stack_rows
from jaxtrain.data.shards import COUNTERS, Encode, Reader, Shard, State
from jaxtrain.data.sources import Source
from jaxtrain.types import Batch

log = logging.getLogger(__name__)

TOTALS = ("examples", "tokens", "slots")  # of the batches handed out; slots: tokens, padding included

_SENT_ROWS = 512  # that all shards of a host together send to worker processes at a time
_PREFETCHED_BATCHES = 2

Snapshots = dict[str, Callable[[], State]]  # of every shard


def count_shards(data: DataSection, rows: int) -> int:
    """The number of virtual shards for global batches of `rows` rows. Raises ValueError where it does not divide."""
    if data.virtual_shards is None:
        return next(n for n in (8, 4, 2, 1) if rows % n == 0)
    if rows % data.virtual_shards:
        raise ValueError(f"train.batch_size={rows} is not a multiple of data.virtual_shards={data.virtual_shards}")
    return data.virtual_shards


class TrainStream:
    """Iterator over this host's rows of the global batches: `Batch` of numpy arrays [rows / num_shards * shards, T].

    Rows are in the order of the virtual shards. The stream ends when all sources are exhausted, which
    only happens with `epochs` set; shards that are exhausted before the others then add rows of padding.
    """

    def __init__(
        self,
        sources: Sequence[SourceSection],
        data: DataSection,
        encode: Encode,
        *,
        rows: int,
        seed: int,
        shards: Sequence[int],
        num_shards: int,
        bundle_size: int = 1,
    ):
        """`rows` counts the global batch, `shards` are those of `num_shards` that this host owns.

        `encode` returns an example of a row, or a bundle of `bundle_size` examples that the objective reads together.
        Each is cut to `data.max_length` tokens. T is `data.row_length`, or `data.max_length` times `bundle_size`.

        Opens the files and encodes the first row of every source, so that wrong data fail here and not after the model
        has been compiled. Raises DataError (naming file and line) and ValueError (naming the config keys).
        """
        if rows % num_shards:
            raise ValueError(f"train.batch_size={rows} is not a multiple of data.virtual_shards={num_shards}")
        with ExitStack() as on_error:
            pool = EncodePool(encode, data.processes) if data.processes else None
            if pool is not None:
                on_error.callback(pool.close)
            self._sources = opened = [Source(section) for section in sources]
            _report_order(opened, data)
            reader = Reader(opened, data, encode, bundle_size)
            mixtures = [
                Mixture(opened, seed=seed, shuffle=data.shuffle, shard=shard, num_shards=num_shards)
                for shard in range(num_shards)
            ]
            on_error.pop_all()
        reader.pool = pool
        self._shards = {str(shard): Shard(mixtures[shard], reader, data) for shard in shards}
        self._reader, self._mixtures, self._encode = reader, mixtures, encode
        self._data, self._rows_per_shard, self._num_shards = data, rows // num_shards, num_shards
        self._fingerprints = fingerprints(opened)
        self._snapshots = self._current_snapshots()
        self._totals = {shard: dict.fromkeys(TOTALS, 0) for shard in self._shards}
        self._producer: _Producer | None = None
        self._counts = True

    def follow(self) -> None:
        """Leave the counts and the state to another host, which reads the same shards: here they are empty."""
        self._counts = False

    def share_prefixes(self) -> None:
        """Have the prompt of a pair in a row once (`Batch.prefix_ids`). Call it before rows are packed or counted."""
        self._reader.share_prefixes = True

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch. Whatever went wrong while it was made is raised here."""
        if not self.has_next():
            raise StopIteration
        batch, self._snapshots = self._running().next()
        # Two calls of numpy for all rows: each waits for the threads that read rows.
        examples, tokens = num_examples(batch).tolist(), np.count_nonzero(batch.segment_ids, axis=1).tolist()
        for index, totals in enumerate(self._totals.values()):
            rows = slice(index * self._rows_per_shard, (index + 1) * self._rows_per_shard)
            totals["examples"] += sum(examples[rows])
            totals["tokens"] += sum(tokens[rows])
            totals["slots"] += self._rows_per_shard * batch.segment_ids.shape[1]
        return batch

    def has_next(self) -> bool:
        """Whether another batch comes; waits until that is known. The state stays that of the last one handed out, and
        at the end of the stream has the rows after it, which gave no example.

        Raises what went wrong while it was made.
        """
        if self._running().has_next():
            return True
        self._snapshots = self._current_snapshots()
        return False

    @property
    def finite(self) -> bool:
        """Whether the stream ends."""
        return self._mixtures[0].finite

    @property
    def signals(self) -> Collection[str]:
        """The names of the signals of its batches."""
        return (self._reader.signals or {}).keys()

    @property
    def has_streams(self) -> bool:
        """Whether a source is a stream, whose rows cannot be counted in advance."""
        return self._mixtures[0].has_streams

    def check_length(self, steps: int | None) -> None:
        """Raises ValueError where a source is a stream and `train.steps` does not say how long the run is."""
        self._mixtures[0].check_length(steps)

    @property
    def epoch_rows(self) -> float:
        """Rows of an epoch of the mixture (see `Mixture`)."""
        return self._mixtures[0].epoch_rows

    def end_after(self, epochs: float) -> None:
        """End the stream after so many epochs of the mixture, instead of where the sources' own `epochs` end."""
        for mixture in self._mixtures:
            mixture.end_after(epochs)

    def lengths(self, encoding: str | None) -> list[Lengths]:
        """Of every source. Every row is read, unless it was before.

        `encoding` changes with what `encode` makes of a row; None: that is not known, and the lengths are not cached.
        Raises DataError for a bad row, unless they are skipped, and for a source of which no row gives an example.
        """
        with self._threads() as workers:
            numbers = range(len(self._reader.sources))
            return [source_lengths(self._reader, number, self._data, workers, encoding) for number in numbers]

    def count(self, lengths: Sequence[Lengths]) -> Count:
        """The global batches of a finite stream from its beginning, exactly."""
        assert self.finite
        rows, length = self._rows_per_shard * self._num_shards, self._data.tokens_per_row(self._reader.bundle_size)
        return count_steps(self._mixtures, lengths, self._data, rows=rows, row=length)

    def padding(self) -> Batch:
        """A batch of nothing but padding, of the shape of the others. It counts nowhere."""
        rows = self._rows_per_shard * len(self._shards)
        return stack_rows([next(iter(self._shards.values())).padding()] * rows)

    def _running(self) -> _Producer:
        if self._producer is None:
            self._expect_of_streams()
            workers = self._threads()
            self._producer = _Producer(self._batches(workers), workers)
        return self._producer

    def _threads(self) -> ThreadPoolExecutor:
        """The threads that read rows, and encode them or wait for worker processes to do so."""
        processes = self._data.processes
        if processes:
            if self._reader.pool is None:  # closed before
                self._reader.pool = EncodePool(self._encode, processes)
            # To send rows to another process costs as much as to encode some, so more are sent at a time.
            self._reader.chunk_rows = max(self._reader.chunk_rows, _SENT_ROWS // len(self._shards))
        threads = max(self._data.workers, 2 * processes)
        self._reader.prefetched_chunks = max(2, -(-2 * threads // len(self._shards)))
        return ThreadPoolExecutor(threads, thread_name_prefix="read")

    def _expect_of_streams(self) -> None:
        """Tell the sources that are streams which rows the shards of this host will read."""
        for number, source in enumerate(self._sources):
            if source.stream is None:
                continue
            following, again = {}, []
            for name, shard in self._shards.items():
                drawn, rows = shard.to_read(number)
                following[int(name)] = int(name) + drawn * self._num_shards
                again += rows
            source.stream.expect(following, self._num_shards, again)

    def _batches(self, workers: ThreadPoolExecutor) -> Iterator[tuple[Batch, Snapshots]]:
        streams = [shard.rows(workers) for shard in self._shards.values()]
        padding = next(iter(self._shards.values())).padding()
        while True:
            rows = [next(stream, None) for stream in streams for _ in range(self._rows_per_shard)]
            if all(row is None for row in rows):
                return
            yield stack_rows([row or padding for row in rows]), self._current_snapshots()

    def _current_snapshots(self) -> Snapshots:
        return {name: shard.snapshot() for name, shard in self._shards.items()}

    @property
    def _state(self) -> State:
        """Of every shard after the last batch handed out."""
        return {name: snapshot() for name, snapshot in self._snapshots.items()}

    @property
    def stats(self) -> dict[str, float]:
        """Counts over this host's shards since the start of training, resumes included; zeros after `follow`.

        `examples tokens slots` are of the batches handed out, `packing_density` = tokens / slots; `rows` of the files
        were read and all of their examples handed out;
        the names in `COUNTERS` count rows of the files up to the last
        batch, those in open rows included.
        """
        shards = self._state if self._counts else {}
        sums: dict[str, float] = {name: sum(self._totals[shard][name] for shard in shards) for name in TOTALS}
        sums["rows"] = sum(sum(state["next"]["counts"]) - _open_rows(state) for state in shards.values())
        for name in COUNTERS:
            sums[name] = sum(state["next"][name] for state in shards.values())
        return sums | {"packing_density": sums["tokens"] / max(sums["slots"], 1)}

    def get_state(self) -> State:
        """JSON-able, keyed by virtual shard: what `set_state` needs to continue after the last batch handed out."""
        shards = self._state if self._counts else {}
        state = {shard: state | {"totals": dict(self._totals[shard])} for shard, state in shards.items()}
        if "0" in state:  # once is enough, and one host owns this shard
            state["0"]["sources"] = self._fingerprints
        return state

    def set_state(self, state: State) -> None:
        """Go on where a state was taken. It may hold more shards than this host owns: those of all hosts.

        Raises ValueError where it comes from another number of virtual shards or of sources, and DataError where a
        file is not what it was.
        """
        known = {str(shard) for shard in range(self._num_shards)}
        if not self._shards.keys() <= state.keys() <= known:
            raise ValueError(
                f"the saved data state has {len(state)} virtual shards and not {self._num_shards}: resume with the "
                "data.virtual_shards and train.batch_size it was saved with"
            )
        for name, shard in self._shards.items():
            shard.check(state[name])
        if "sources" in state.get("0", {}):
            check_unchanged(state["0"]["sources"], self._fingerprints)
        self._stop()
        for name, shard in self._shards.items():
            shard.restore({key: state[name][key] for key in ("next", "open")})
            self._totals[name] = dict(state[name]["totals"])
        self._snapshots = self._current_snapshots()

    def close(self) -> None:
        """Stop the threads and worker processes. The next batch after that is the one that would have come anyway."""
        self._stop()
        if self._reader.pool is not None:
            self._reader.pool.close()
            self._reader.pool = None

    def _stop(self) -> None:
        if self._producer is not None:
            self._producer.close()
            self._producer = None
            for name, state in self._state.items():
                self._shards[name].restore(state)

    def __enter__(self) -> TrainStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _report_order(sources: Sequence[Source], data: DataSection) -> None:
    """Warn where `data.shuffle` is expensive, and say where it does not apply."""
    size = sum(source.block_bytes for source in sources)
    if data.shuffle is True and size > CACHE_BYTES:
        log.warning(
            "%d MiB of the training data have no cheap access by index, and %d MiB are held in memory: with "
            "data.shuffle=true nearly every row costs reading a block of some MiB; data.shuffle=blocks reads each once",
            *(size >> 20, CACHE_BYTES >> 20),
        )
    for source in sources if data.shuffle else ():
        if source.stream is not None:
            log.info("%s: a stream is read in its own order; data.shuffle has no effect on it", source.section.path)


def _open_rows(state: State) -> int:
    """Rows of the files that have an example in an open row of a shard."""
    return len({(source, row) for packed in state["open"] for source, row, _ in packed})


def eval_batches(
    sources: Sequence[SourceSection],
    data: DataSection,
    encode: Encode,
    *,
    rows: int,
    bundle_size: int = 1,
) -> Iterator[Batch]:
    """Every example once, packed, always in the same order; the last batch is filled up with rows of padding.

    `rows` counts the global batch: every host packs the whole set, so all of them see the same batches.
    """
    once = [source.model_copy(update={"epochs": 1}) for source in sources]
    in_order = data.model_copy(update={"shuffle": False})
    stream = TrainStream(once, in_order, encode, rows=rows, seed=0, shards=[0], num_shards=1, bundle_size=bundle_size)
    with stream:
        yield from stream


class _Producer:
    """Runs an iterator in a thread, a few elements ahead. An exception is raised by `next` in order."""

    def __init__(self, elements: Iterator[tuple[Batch, Snapshots]], workers: ThreadPoolExecutor):
        self._elements, self._workers = elements, workers
        self._queue: queue.Queue[Any] = queue.Queue(_PREFETCHED_BATCHES)
        self._stop = threading.Event()
        self._next: tuple[Batch, Snapshots] | None = None  # peeked at, not yet returned
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="pack", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for element in self._elements:
                if not self._put(element):
                    return
            self._put(StopIteration())
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put(error)

    def _put(self, element: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(element, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def has_next(self) -> bool:
        if self._next is None and self._end is None:
            element = self._queue.get()
            if isinstance(element, BaseException):
                self._end = element
            else:
                self._next = element
        if self._end is None:
            return True
        if isinstance(self._end, StopIteration):
            return False
        raise self._end

    def next(self) -> tuple[Batch, Snapshots]:
        """The next element, once `has_next` has found one."""
        assert self._next is not None
        element, self._next = self._next, None
        return element

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._workers.shutdown(cancel_futures=True)
