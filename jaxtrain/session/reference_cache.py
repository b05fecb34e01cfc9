"""Log-probabilities of the reference, computed once: Parquet files with the columns that the encoder reads.

Each column (`ref_chosen_logps` ...) has a list with one float32 per token. See `session.source_cache`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from jaxtrain.data.columns import Row
from jaxtrain.data.packing import RowExamples, as_bundle, fit
from jaxtrain.data.pairs import AnswerEncoder
from jaxtrain.data.sources import Source
from jaxtrain.roles.role import Role, TrainedRole
from jaxtrain.session.inputs import fingerprint_path
from jaxtrain.session.reference import load_reference
from jaxtrain.session.session import Session
from jaxtrain.session.source_cache import CacheItem, cached_rows, score_packed, source_items


def use_cached_logps(session: Session, policy: TrainedRole, encode: AnswerEncoder) -> None:
    """Let `encode` read the log-probabilities in `reference.cache`, if that is set; those of sources that have none
    there are computed first. Every host calls it, and all see the same folder.

    Raises ValueError for a file that was computed from something else.
    """
    section = session.config.reference
    if section is None or section.cache is None:
        return

    @cache
    def reference() -> Role:
        return load_reference(session, policy)

    def compute(source: Source) -> Mapping[str, pa.Array]:
        return _columns(session, reference(), encode, source)

    encode.references = cached_rows(session, section.cache, "reference.cache", _origin(session, encode), compute)


def _origin(session: Session, encode: AnswerEncoder) -> dict[str, Any]:
    """What the log-probabilities depend on beside the data, JSON-able."""
    config = session.config
    assert config.reference is not None
    path, lora = config.reference.path or config.model.path, config.model.lora
    model: dict[str, Any] = {"dtype": config.model.compute_dtype, "param_dtype": config.model.param_dtype}
    model |= {"modules": config.model.modules.model_dump()}
    if path is None:
        model |= {"config": config.model.config, "seed": config.run.seed}
    else:
        model |= {"files": fingerprint_path("reference.path", path)}
    if config.reference.path is None:
        model |= {"quantize": config.model.quantize}
        if lora and lora.path:
            model |= {"adapter": fingerprint_path("model.lora.path", lora.path)}
    return {"model": model, "encoder": encode.fingerprint}


def _columns(session: Session, role: Role, encode: AnswerEncoder, source: Source) -> Mapping[str, pa.Array]:
    columns: dict[str, list[np.ndarray | None]] = {}
    length = session.config.data.tokens_per_row(encode.bundle_size)
    for item, scores in score_packed(session, role, _bundles(session, encode, source), length, role.logps):
        for name, logps in zip(item.columns, scores, strict=True):
            columns.setdefault(name, [None] * len(source))[item.row] = logps
    return {name: pa.array(lists, pa.list_(pa.float32())) for name, lists in columns.items()}


def _bundles(session: Session, encode: AnswerEncoder, source: Source) -> Iterator[CacheItem]:
    """The examples of all rows, cut to `data.max_length`."""
    data = session.config.data

    def make(number: int, row: Row) -> list[CacheItem]:
        made = encode(row | encode.more_columns(source, number))
        bundles = [as_bundle(item) for item in (made.items if isinstance(made, RowExamples) else [made])]
        size, names = encode.bundle_size, encode.reference_columns(row)
        return [
            CacheItem(number, tuple(names[at * size :][:size]), fitted)
            for at, bundle in enumerate(bundles)
            for fitted in fit(bundle, data.max_length, data.overlong).items
        ]

    return source_items(session, source, make)
