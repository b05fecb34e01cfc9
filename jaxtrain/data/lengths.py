"""The steps of a finite stream, counted before the first of them: packing makes their number depend on every length.

Each row is read and tokenised once, in the threads of an executor, and only the lengths of its pieces are kept. They
are cached in the user's cache folder, one file a source. Drawing and packing are then repeated with lengths instead of
tokens, by the code that the stream itself runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zipfile
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.config import DataSection
from jaxtrain.data.fingerprints import fingerprints
from jaxtrain.data.mixing import Mixture
from jaxtrain.data.packing import BestFit, bundle_tokens
from jaxtrain.data.shards import COUNTERS, Reader
from jaxtrain.data.sources import DataError, Source
from jaxtrain.remote import cache_home

log = logging.getLogger(__name__)

_CHUNK, _PREFETCHED_CHUNKS = 64, 16  # rows that a worker thread takes at a time, and how many of them
_LOG_FROM_ROWS = 10_000  # rows whose reading is announced, because it takes a while

_BAD = 1 << COUNTERS.index("bad_rows")  # in `Lengths.events`

# What decides how rows are ordered and packed, or how fast they are read, and not how long they are.
_KEYS_WITHOUT_EFFECT_ON_LENGTHS = {
    "train",
    "eval",
    "packing",
    "packing_bins",
    "virtual_shards",
    "shuffle",
    "workers",
    "processes",
    "on_bad_row",
}
_SOURCE_KEYS_WITHOUT_EFFECT = {"weight", "epochs", "name"}


class Lengths(NamedTuple):
    """Of every row of a source: the pieces `sizes[ends[row - 1]:ends[row]]` that it makes, and its counters."""

    ends: np.ndarray  # [rows] int64
    sizes: np.ndarray  # [pieces] int32: tokens
    events: np.ndarray  # [rows] uint16: bit i is set where the row adds to the counter `COUNTERS[i]`

    def pieces(self, row: int) -> list[int]:
        return self.sizes[self.ends[row - 1] if row else 0 : self.ends[row]].tolist()


class Count(NamedTuple):
    """The size of a finite stream."""

    steps: int
    slots: int  # tokens of all batches, padding included
    totals: dict[str, int]  # rows drawn, examples, tokens, and the counters of rows

    @property
    def density(self) -> float:
        return self.totals["tokens"] / max(self.slots, 1)


def count_steps(mixtures: Sequence[Mixture], lengths: Sequence[Lengths], data: DataSection, *, rows: int, row: int):
    """The `Count` of a stream of batches of `rows` rows of `row` tokens. `mixtures`: those of all virtual shards."""
    totals: Counter[str] = Counter(dict.fromkeys(("rows", "examples", "tokens", *COUNTERS), 0))
    packed = [
        _packed_rows(mixture, lengths, BestFit(row, data.packing_bins if data.packing else 0), totals)
        for mixture in mixtures
    ]
    steps = -(-max(packed) * len(mixtures) // rows)
    return Count(steps, steps * rows * row, dict(totals))


def _packed_rows(mixture: Mixture, lengths: Sequence[Lengths], packer: BestFit[None], totals: Counter[str]) -> int:
    """The packed rows of one virtual shard. Adds to `totals`."""
    counts, packed = mixture.start, 0
    while (draw := mixture.draw(counts)) is not None:
        counts, of = draw.counts, lengths[draw.source]
        totals["rows"] += 1
        if events := of.events[draw.row]:
            totals.update(name for bit, name in enumerate(COUNTERS) if events >> bit & 1)
        for size in of.pieces(draw.row):
            packed += packer.add(None, size) is not None
            totals["examples"] += 1
            totals["tokens"] += size
    return packed + len(packer.open_rows)


def source_lengths(reader: Reader, number: int, data: DataSection, executor: Executor, encoding: str | None) -> Lengths:
    """Of the rows of source `number`, from the cache where it has them.

    `encoding` changes with whatever decides the example of a row besides `data`; None: that is not known. Then nothing
    is cached, and neither are rows of a custom function, which may return others without a change that shows.
    Raises DataError for a bad row, unless they are skipped, and where no row gives an example.
    """
    source = reader.sources[number]
    path = None
    if encoding is not None and source.section.source is None:
        path = cache_home() / "lengths" / f"{_key(source, data, (encoding, reader.share_prefixes))}.npz"
    found = path and _load(path, len(source))
    if found and data.on_bad_row == "error" and (found.events & _BAD).any():
        found = None  # reading names the row
    if found is None:
        started = time.perf_counter()
        if len(source) >= _LOG_FROM_ROWS:
            log.info("%s: reading the lengths of %d rows, to count the steps", source.section.path, len(source))
        found = _read(reader, number, executor)
        kept = f"cached in {path}" if path is not None else "not cached: a custom function makes rows or examples"
        if path is not None and not _save(path, found):
            kept = f"not cached: {path.parent} cannot be written"
        seconds = time.perf_counter() - started
        log.info("%s: read the lengths of %d rows in %.1f s (%s)", source.section.path, len(source), seconds, kept)
    if not len(found.sizes):
        reader.raise_useless(number, Counter(row_counts([found])))
    return found


def row_counts(lengths: Sequence[Lengths]) -> dict[str, int]:
    """Of each counter, the number of rows that add to it."""
    events = np.concatenate([each.events for each in lengths])
    return {name: int(np.count_nonzero(events >> bit & 1)) for bit, name in enumerate(COUNTERS)}


def _read(reader: Reader, number: int, executor: Executor) -> Lengths:
    rows = len(reader.sources[number])
    counts, events, sizes = np.zeros(rows, np.int64), np.zeros(rows, np.uint16), []
    pending: deque[Future[list[Any]]] = deque()
    chunks = iter(range(0, rows, _CHUNK))
    row = 0
    while True:
        while len(pending) < _PREFETCHED_CHUNKS and (start := next(chunks, None)) is not None:
            places = [(number, at) for at in range(start, min(start + _CHUNK, rows))]
            pending.append(reader.submit(executor, places))
        if not pending:
            break
        for read in pending.popleft().result():
            if isinstance(read, DataError):
                raise read
            lengths = [bundle_tokens(piece, reader.share_prefixes) for piece in read.items]
            sizes += lengths
            counts[row], events[row] = len(lengths), sum(1 << COUNTERS.index(name) for name in read.events)
            row += 1
    return Lengths(counts.cumsum(), np.array(sizes, np.int32), events)


def _key(source: Source, data: DataSection, encoding: tuple[str, bool]) -> str:
    """Changes with the files, their times included, with everything that decides a row's length, and with this code."""
    files = [
        {**file, "changed": os.stat(file["path"]).st_mtime_ns if os.path.exists(file["path"]) else None}
        for file in fingerprints([source])[0]
    ]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))))
    parts = {
        "files": files,
        "source": source.section.model_dump(mode="json", exclude=_SOURCE_KEYS_WITHOUT_EFFECT),
        "data": data.model_dump(mode="json", exclude=_KEYS_WITHOUT_EFFECT_ON_LENGTHS),
        "encoding": encoding,
        "code": code.hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _load(path: Path, rows: int) -> Lengths | None:
    """None where there is no such file, or one that cannot be read."""
    try:
        with np.load(path) as stored:
            found = Lengths(**{name: stored[name] for name in Lengths._fields})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return found if len(found.ends) == rows else None


def _save(path: Path, lengths: Lengths) -> bool:
    """Whether the file could be written. It appears complete or not at all."""
    partial = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **lengths._asdict())
        partial.replace(path)
    except OSError:
        return False
    return True
