"""What a frozen model computes for the rows of the data, once: Parquet files with one row for each row of a source.

A file also has what it was computed from: the fingerprints of the model, the encoder and the data, and the settings
that cut examples. A file of anything else is refused.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.experimental import multihost_utils

from jaxtrain.config import SourceSection
from jaxtrain.data.columns import Row
from jaxtrain.data.files.find import open_rows
from jaxtrain.data.packing import BestFit, make_row, signal_types, stack_rows
from jaxtrain.data.sources import DataError, Source
from jaxtrain.parallel.batches import place_batch
from jaxtrain.roles.role import Role
from jaxtrain.session.session import Session
from jaxtrain.train.agree import barrier
from jaxtrain.types import Batch, Bundle

log = logging.getLogger(__name__)

_KEY = b"jaxtrain"


class CacheItem(NamedTuple):
    """What one bundle of a source is scored for."""

    row: int  # of the source
    columns: tuple[str, ...]  # of each example
    examples: Bundle


def cached_rows(
    session: Session,
    folder: str,
    key: str,
    origin: Mapping[str, Any],
    compute: Callable[[Source], Mapping[str, pa.Array]],
) -> dict[str, Any]:
    """The rows of the files in `folder`, the value of the config's `key`, by the `rows_key` of their source.

    A source without a file gets one with the columns of `compute`. `origin`: what they depend on beside the data,
    JSON-able. Every host calls it, and all see the same folder.

    Raises ValueError for a file that was computed from something else, and for a stream.
    """
    data, found = session.config.data, {}
    for number, section in enumerate([*data.train_sources, *data.eval_sources]):
        path, started = Path(folder) / f"{number}.parquet", time.perf_counter()
        full_origin = json.loads(json.dumps({**origin, **_data_origin(session, section)}))
        computed: Mapping[str, pa.Array] = {}
        if not _exists(path):
            source = Source(section)
            if source.stream is not None:
                raise ValueError(f"{key}: {section.path} is a stream, whose rows have no number")
            computed = compute(source)
            _write(path, computed, full_origin)
        _check_origin(path, full_origin, key)
        if computed:
            numbers = sum(len(column.flatten()) for column in computed.values())
            size, seconds = path.stat().st_size / 1e6, time.perf_counter() - started
            log.info("%s: %d numbers in %s, %.1f MB (%.1f s)", section.path, numbers, path, size, seconds)
        found[section.rows_key] = open_rows(str(path), None, 1)
    return found


def _exists(path: Path) -> bool:
    """Whether the first host sees the file: the same on all hosts, which compute together what is missing."""
    if jax.process_count() == 1:
        return path.exists()
    return bool(multihost_utils.broadcast_one_to_all(np.array(path.exists())))


def _data_origin(session: Session, section: SourceSection) -> dict[str, Any]:
    """What the examples of a source depend on beside its encoder, JSON-able."""
    data = session.config.data
    source = {"files": [{**file, "path": Path(file["path"]).name} for file in Source(section).fingerprint()]}
    source |= {"columns": section.columns, "limit": section.limit}
    return {"data": source, "data.cut": {"max_length": data.max_length, "overlong": data.overlong}}


def _check_origin(path: Path, origin: dict[str, Any], key: str) -> None:
    if not path.exists():
        raise ValueError(f"{path} is not there on process {jax.process_index()}: all hosts must see {key}")
    stored = json.loads((pq.read_schema(path).metadata or {}).get(_KEY, b"{}"))
    if changed := [name for name in origin if stored.get(name) != origin[name]]:
        raise ValueError(
            f"{path}: the log-probabilities are of another {' and '.join(changed)}: remove the file to compute them "
            f"again, or choose another {key}"
        )


def _write(path: Path, columns: Mapping[str, pa.Array], origin: dict[str, Any]) -> None:
    """Every host calls it, and the first one writes."""
    if jax.process_index() == 0:
        table = pa.table(dict(sorted(columns.items())))
        table = table.replace_schema_metadata({_KEY: json.dumps(origin).encode()})
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_suffix(".tmp")
        pq.write_table(table, partial_file, compression="zstd")
        partial_file.replace(path)
    barrier(f"cache {path}")


def source_items(
    session: Session, source: Source, make: Callable[[int, Row], Iterable[CacheItem]]
) -> Iterator[CacheItem]:
    """`make(number, row)` of all rows in order. Bad rows are left to the training stream."""
    for number in range(len(source)):
        try:
            yield from source.make(number, partial(make, number))
        except DataError:
            if session.config.data.on_bad_row == "error":
                raise


def score_packed(
    session: Session, role: Role, items: Iterator[CacheItem], length: int, score: Callable[[Batch], Any]
) -> Iterator[tuple[CacheItem, list[Any]]]:
    """Every item, in any order, with the part of each of its examples of `score(batch)`, a tree of arrays [B, T, ...].

    The items are packed into batches of `train.batch_size` rows of `length` tokens.
    """
    rows = session.config.train.batch_size
    packed = _packed(items, length, session.config.data.packing_bins)
    while group := list(itertools.islice(packed, rows)):
        padding = [make_row([], length, signal_types(group[0][0].examples))] * (rows - len(group))
        batch = stack_rows([make_row([item.examples for item in row], length) for row in group] + padding)
        scores = jax.tree.map(_on_host, score(place_batch(batch, role.mesh, rows)))
        for number, row in enumerate(group):
            at = 0
            for item in row:
                ends = at + np.cumsum([len(example.input_ids) for example in item.examples])
                spans = [slice(start, end) for start, end in zip([at, *ends[:-1]], ends, strict=True)]
                at = ends[-1]
                of_row = jax.tree.map(lambda leaf, n=number: leaf[n], scores)
                yield item, [jax.tree.map(lambda leaf, s=span: leaf[s], of_row) for span in spans]
        session.check()


def _packed(items: Iterator[CacheItem], length: int, max_open: int) -> Iterator[list[CacheItem]]:
    packer: BestFit[CacheItem] = BestFit(length, max_open)
    for item in items:
        row = packer.add(item, sum(len(example.input_ids) for example in item.examples))
        if row is not None:
            yield row
    while (row := packer.pop()) is not None:
        yield row


def _on_host(array: jax.Array) -> np.ndarray:
    if jax.process_count() == 1:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
