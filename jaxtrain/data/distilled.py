"""Examples with a teacher's log-probabilities, which are in rows beside those of their source."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtrain.config import DataSection
from jaxtrain.data.columns import Row
from jaxtrain.data.encoder import EvalPrompt, RowEncoder
from jaxtrain.data.formats import Encoder
from jaxtrain.data.packing import Overlong, RowExamples, fit
from jaxtrain.data.sources import Source
from jaxtrain.types import Example

IDS, LOGPS = "teacher_ids", "teacher_logps"
"""The columns of such rows: k numbers for each trained token of the row, one token after the other. The signals of an
example have the same names, and are [n, k]: 0 at tokens that are not trained."""


class DistilledEncoder(RowEncoder):
    """The examples of another encoder, cut to `data.max_length`, with the signals `teacher_ids` and `teacher_logps`.

    `caches`, by the `rows_key` of a source, are rows with the columns.
    """

    caches: Mapping[str, Any] = {}

    def __init__(self, encode: Encoder, data: DataSection, k: int):
        self._encode, self._max_length, self._k = encode, data.max_length, k
        self._overlong: Overlong = data.overlong

    def __getstate__(self) -> dict[str, Any]:
        """Without `caches`: worker processes get rows that have these columns."""
        return {name: value for name, value in vars(self).items() if name != "caches"}

    @property
    def fingerprint(self) -> str:
        settings = type(self).__name__, self._k, self._max_length, self._overlong, self._encode.fingerprint
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def note_ignored(self, row: Row, source: Source) -> None:
        self._encode.note_ignored(row, source)

    def more_columns(self, source: Source, row: int) -> Row:
        return self.caches[source.section.rows_key][row]

    def prompt(self, row: Row) -> EvalPrompt:
        return self._encode.prompt(row)

    def question(self, row: Row) -> tuple[np.ndarray, Row]:
        return self._encode.question(row)

    def pieces(self, row: Row) -> RowExamples:
        """The examples without the signals."""
        made = self._encode({name: value for name, value in row.items() if name not in (IDS, LOGPS)})
        examples, events = (made.items, made.events) if isinstance(made, RowExamples) else ([made], ())
        fitted = [fit(example, self._max_length, self._overlong) for example in examples]
        counted = {*events, *(each.event for each in fitted if each.event is not None)}
        return RowExamples([piece for each in fitted for piece in each.items], tuple(sorted(counted)))

    def __call__(self, row: Row) -> RowExamples:
        """Raises ValueError for a row that cannot be read, or whose log-probabilities are of other tokens."""
        found, at = self.pieces(row), 0
        if not found.items:
            return found
        ids, logps = (np.asarray(row.get(name) or ()).reshape(-1, self._k) for name in (IDS, LOGPS))
        trained = sum(np.count_nonzero(example.loss_weights) for example in found.items)
        if not len(ids) == len(logps) == trained:
            raise ValueError(f"teacher.cache has the log-probabilities of {len(ids)} tokens, and {trained} are trained")
        items = []
        for example in found.items:
            places = np.flatnonzero(example.loss_weights)
            items.append(self._with_signals(example, places, *(x[at : at + len(places)] for x in (ids, logps))))
            at += len(places)
        return RowExamples(items, found.events)

    def _with_signals(self, example: Example, places: np.ndarray, ids: np.ndarray, logps: np.ndarray) -> Example:
        shape = (len(example.input_ids), self._k)
        signals = {IDS: np.zeros(shape, np.int32), LOGPS: np.zeros(shape, np.float32)}
        signals[IDS][places], signals[LOGPS][places] = ids, logps
        return example._replace(signals={**example.signals, **signals})
