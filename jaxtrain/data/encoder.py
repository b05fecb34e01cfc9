"""The interface of encoders, which make examples of the rows of data for a recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from jaxtrain.data.columns import Row
from jaxtrain.data.packing import RowExamples
from jaxtrain.data.sources import Source
from jaxtrain.types import Bundle, Example


class EvalPrompt(NamedTuple):
    """A held-out question, and what the data set answers."""

    input_ids: np.ndarray  # [n] int32
    answer: str


class RowEncoder(ABC):
    """Rows, under our column names, -> examples. Every fault of a row is a ValueError. Safe to call from threads."""

    bundle_size: int = 1
    """The number of examples that the objective reads together."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes with whatever decides the examples that a row makes, except the row itself."""

    @abstractmethod
    def __call__(self, row: Row) -> Example | Bundle | RowExamples: ...

    @abstractmethod
    def note_ignored(self, row: Row, source: Source) -> None:
        """Report the columns of a source, of which `row` is one, that are not read: each once."""

    @abstractmethod
    def prompt(self, row: Row) -> EvalPrompt:
        """The row's question and its right answer. Raises ValueError where it has none."""

    @abstractmethod
    def question(self, row: Row) -> tuple[np.ndarray, Row]:
        """The ids [n] of the row's question, and the row with its columns `prompt` and, if it has one, `answer`.

        Raises ValueError.
        """

    def more_columns(self, source: Source, row: int) -> Row:
        """Columns that row number `row` has besides those of its source."""
        return {}


class _NestingBounded:
    """A context in which values nested more deeply than Python can walk are a fault of their row."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, RecursionError):
            raise ValueError("its values are nested too deeply") from None


NESTING_BOUNDED = _NestingBounded()
