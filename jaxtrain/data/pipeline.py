"""The stream of packed batches, made ahead of the training step.

Each virtual shard is a stream with its own state. A host reads some of them and stacks their rows, so the global batch
does not depend on which host reads which shard, and a checkpoint restores onto any number of hosts.

A producer thread packs; `data.workers` threads read and tokenise for it. Each batch is queued together with the state
after it, so the state that is saved is that of the last batch handed out, however far ahead the threads are.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.fingerprints import check_unchanged, fingerprints
from jaxtrain.data.mixing import Mixture
from jaxtrain.data.packing import stack_rows
from jaxtrain.data.shards import COUNTERS, Encode, Reader, Shard, State
from jaxtrain.data.sources import Source
from jaxtrain.types import Batch

TOTALS = ("examples", "tokens", "slots")  # of the batches handed out; slots: tokens, padding included

_BATCHES_AHEAD = 2


def count_shards(data: DataSection, rows: int) -> int:
    """The number of virtual shards for global batches of `rows` rows. Raises ValueError where it does not divide."""
    if data.virtual_shards is None:
        return next(n for n in (8, 4, 2, 1) if rows % n == 0)
    if rows % data.virtual_shards:
        raise ValueError(f"train.batch_size={rows} is no multiple of data.virtual_shards={data.virtual_shards}")
    return data.virtual_shards


def host_shards(host: int, hosts: int, num_shards: int) -> range:
    """The virtual shards that a host owns: equal runs, in order. Raises ValueError where they do not divide."""
    if num_shards % hosts:
        raise ValueError(
            f"{num_shards} virtual shards cannot be dealt to {hosts} hosts evenly; set data.virtual_shards to a "
            f"multiple of {hosts} that divides train.batch_size"
        )
    each = num_shards // hosts
    return range(host * each, (host + 1) * each)


class TrainStream:
    """Iterator over this host's rows of the global batches: `Batch` of numpy arrays [rows / num_shards * shards, T].

    Rows stand in the order of the virtual shards. The stream ends when all sources are exhausted, which
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
        Each is cut to `data.max_length` tokens, and T is `data.max_length` times `bundle_size`.

        Opens the files and encodes the first row of every source, so that wrong data fail here and not after the model
        has been compiled. Raises DataError (naming file and line) and ValueError (naming the config keys).
        """
        if rows % num_shards:
            raise ValueError(f"train.batch_size={rows} is no multiple of data.virtual_shards={num_shards}")
        opened = [Source(section) for section in sources]
        reader = Reader(opened, data, encode, bundle_size)
        self._shards = {
            str(shard): Shard(
                Mixture(opened, seed=seed, shuffle=data.shuffle, shard=shard, num_shards=num_shards), reader, data
            )
            for shard in shards
        }
        self._data, self._rows_per_shard, self._num_shards = data, rows // num_shards, num_shards
        self._fingerprints = fingerprints(opened)
        self._state = self._shard_states()
        self._totals = {shard: dict.fromkeys(TOTALS, 0) for shard in self._shards}
        self._producer: _Producer | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch. Whatever went wrong while it was made is raised here."""
        batch, self._state = self._running().take()
        self._count(batch)
        return batch

    def has_next(self) -> bool:
        """Whether another batch comes; waits until that is known. The state stays that of the last one handed out.

        Raises what went wrong while it was made.
        """
        return self._running().has_next()

    def padding(self) -> Batch:
        """A batch of nothing but padding, of the shape of the others. It counts nowhere."""
        rows = self._rows_per_shard * len(self._shards)
        return stack_rows([next(iter(self._shards.values())).padding()] * rows)

    def _running(self) -> _Producer:
        if self._producer is None:
            workers = ThreadPoolExecutor(self._data.workers, thread_name_prefix="tokenise")
            self._producer = _Producer(self._batches(workers), workers)
        return self._producer

    def _batches(self, workers: ThreadPoolExecutor) -> Iterator[tuple[Batch, State]]:
        streams = [shard.rows(workers) for shard in self._shards.values()]
        padding = next(iter(self._shards.values())).padding()
        while True:
            rows = [next(stream, None) for stream in streams for _ in range(self._rows_per_shard)]
            if all(row is None for row in rows):
                return
            yield stack_rows([row or padding for row in rows]), self._shard_states()

    def _shard_states(self) -> State:
        return {name: shard.state() for name, shard in self._shards.items()}

    def _count(self, batch: Batch) -> None:
        for index, totals in enumerate(self._totals.values()):
            segments = batch.segment_ids[index * self._rows_per_shard : (index + 1) * self._rows_per_shard]
            totals["examples"] += int(segments.max(axis=1).sum())
            totals["tokens"] += int(np.count_nonzero(segments))
            totals["slots"] += segments.size

    @property
    def stats(self) -> dict[str, float]:
        """Counts over this host's shards since the start of training, resumes included.

        `examples tokens slots` are of the batches handed out, `packing_density` = tokens / slots;
        `truncated dropped split bad_rows` count rows of the files up to the last batch, those in open rows included.
        """
        sums: dict[str, float] = {name: sum(t[name] for t in self._totals.values()) for name in TOTALS}
        for name in COUNTERS:
            sums[name] = sum(state["next"][name] for state in self._state.values())
        return sums | {"packing_density": sums["tokens"] / max(sums["slots"], 1)}

    def get_state(self) -> State:
        """JSON-able, keyed by virtual shard: what `set_state` needs to go on after the last batch handed out."""
        state = {shard: state | {"totals": dict(self._totals[shard])} for shard, state in self._state.items()}
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
        self.close()
        for name, shard in self._shards.items():
            shard.restore({key: state[name][key] for key in ("next", "open")})
            self._totals[name] = dict(state[name]["totals"])
        self._state = self._shard_states()

    def close(self) -> None:
        """Stop the threads. The next batch after that is the one that would have come anyway."""
        if self._producer is not None:
            self._producer.close()
            self._producer = None
            for name, shard in self._shards.items():
                shard.restore(self._state[name])

    def __enter__(self) -> TrainStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def eval_batches(
    sources: Sequence[SourceSection],
    data: DataSection,
    encode: Encode,
    *,
    rows: int,
    host: int = 0,
    hosts: int = 1,
    bundle_size: int = 1,
) -> Iterator[Batch]:
    """Every example once, packed, always in the same order; the last batch is filled up with rows of padding.

    `rows` counts the global batch, of which host `host` gets the `rows / hosts` rows from `host * rows / hosts` on.
    Every host packs the whole set, so all of them see the same number of batches.
    """
    if rows % hosts:
        raise ValueError(f"train.batch_size={rows} is no multiple of the {hosts} hosts")
    once = [source.model_copy(update={"epochs": 1}) for source in sources]
    in_order = data.model_copy(update={"shuffle": False})
    mine = slice(host * rows // hosts, (host + 1) * rows // hosts)
    stream = TrainStream(once, in_order, encode, rows=rows, seed=0, shards=[0], num_shards=1, bundle_size=bundle_size)
    with stream:
        for batch in stream:
            yield batch.map(lambda column: column[mine])


class _Producer:
    """Runs an iterator in a thread, a few elements ahead. An exception reaches `take` in its turn."""

    def __init__(self, elements: Iterator[tuple[Batch, State]], workers: ThreadPoolExecutor):
        self._elements, self._workers = elements, workers
        self._queue: queue.Queue[Any] = queue.Queue(_BATCHES_AHEAD)
        self._stop = threading.Event()
        self._next: tuple[Batch, State] | None = None  # looked at and not taken
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

    def take(self) -> tuple[Batch, State]:
        if not self.has_next():
            raise StopIteration
        assert self._next is not None
        element, self._next = self._next, None
        return element

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._workers.shutdown(cancel_futures=True)
