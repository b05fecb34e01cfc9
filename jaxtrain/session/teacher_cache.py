"""A teacher's largest log-probabilities, computed once and kept in Parquet files. See `session.source_cache`.

A file has the columns `teacher_ids` and `teacher_logps` (see `data.distilled`) of int32 and float32: for each trained
token 8 bytes times `teacher.top_logps`, before compression.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from jaxtrain.data.columns import Row
from jaxtrain.data.distilled import IDS, LOGPS, DistilledEncoder
from jaxtrain.data.sources import Source
from jaxtrain.ops.head_chunks import TopK
from jaxtrain.roles.role import Role, TrainedRole
from jaxtrain.session.inputs import fingerprint_path
from jaxtrain.session.session import Session
from jaxtrain.session.source_cache import CacheItem, cached_rows, score_packed, source_items
from jaxtrain.session.teacher import check_same_ids, teacher_role
from jaxtrain.types import Batch

DEFAULT_TOP = 64


class CachedLogps:
    """Encodes examples with the log-probabilities in `teacher.cache`. Those of sources without any are computed first.

    Every host creates it, and all see the same folder.
    """

    def __init__(self, session: Session, student: TrainedRole):
        """Raises ValueError for a file that was computed from something else, or a teacher with other token ids."""
        config, section = session.config, session.config.teacher
        assert section is not None and section.cache is not None
        self._session, self._temperature = session, config.objective.temperature
        self._k = section.top_logps or DEFAULT_TOP
        teacher = teacher_role(session)
        check_same_ids(session, student, teacher)
        self._common = min(role.model.config.vocab_size for role in (student, teacher))
        if self._k >= self._common:
            raise ValueError(
                f"teacher.top_logps={self._k} must be less than the {self._common} tokens of the vocabulary"
            )
        self.encode = DistilledEncoder(session.encoder(student), config.data, self._k)

        @cache
        def loaded() -> Role:
            teacher.load()
            return teacher

        def compute(source: Source) -> Mapping[str, pa.Array]:
            return self._columns(loaded(), source)

        self.encode.caches = cached_rows(session, section.cache, "teacher.cache", self._origin(), compute)

    def load(self) -> None:
        """Nothing: the log-probabilities are part of the data."""

    def __call__(self, batch: Batch) -> Batch:
        return batch

    def _origin(self) -> dict[str, Any]:
        """What the log-probabilities depend on beside the data, JSON-able."""
        config = self._session.config
        assert config.teacher is not None and config.teacher.path is not None
        model = {"files": fingerprint_path("teacher.path", config.teacher.path), "dtype": config.model.compute_dtype}
        model |= {"param_dtype": config.teacher.param_dtype}
        logps = {"top_logps": self._k, "temperature": self._temperature, "vocabulary": self._common}
        return {"model": model, "encoder": self.encode.fingerprint, "log-probability": logps}

    def _columns(self, teacher: Role, source: Source) -> Mapping[str, pa.Array]:
        pieces: list[dict[str, TopK]] = [{} for _ in range(len(source))]  # of each row, by their number
        length = self._session.config.data.max_length

        def score(batch: Batch) -> TopK:
            return teacher.top_logps(batch, self._k, temperature=self._temperature, vocab_size=self._common)

        for item, scores in score_packed(self._session, teacher, self._pieces(source), length, score):
            (example,), (top,), (name,) = item.examples, scores, item.columns
            pieces[item.row][name] = TopK(*(x[np.flatnonzero(example.loss_weights)] for x in top))
        in_order = [[of_row[name] for name in sorted(of_row, key=int)] for of_row in pieces]
        return {
            name: pa.array(
                [np.concatenate([top[n].reshape(-1) for top in tops]) if tops else None for tops in in_order],
                pa.list_(kind),
            )
            for n, (name, kind) in enumerate([(IDS, pa.int32()), (LOGPS, pa.float32())])
        }

    def _pieces(self, source: Source) -> Iterator[CacheItem]:
        """The examples of all rows, one item each."""

        def make(number: int, row: Row) -> list[CacheItem]:
            pieces = self.encode.pieces(row).items
            return [CacheItem(number, (str(place),), (piece,)) for place, piece in enumerate(pieces)]

        return source_items(self._session, source, make)
