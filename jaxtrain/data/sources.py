"""Random access to the rows of a source: those of local or remote files, of a function, or given by a program.

A training run reads rows in shuffled order, so every format must support access by index; see `jaxtrain.data.files`.
"""

from __future__ import annotations

import logging
import warnings
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxtrain.config import ROWS_PREFIX, SourceSection
from jaxtrain.config.python_values import SOURCE_PREFIX
from jaxtrain.data.columns import COLUMNS, RENDERED_COLUMNS, Row, rename_columns
from jaxtrain.data.files.columnar import ParquetRows, check_types
from jaxtrain.data.files.errors import DataError as DataError
from jaxtrain.data.files.errors import suggest
from jaxtrain.data.files.find import find_files, open_blob, open_rows
from jaxtrain.data.files.rows import Rows
from jaxtrain.data.given import ENDLESS as ENDLESS
from jaxtrain.data.given import GivenRows, SequenceRows, StreamRows, given_rows
from jaxtrain.data.given import StreamEndError as StreamEndError
from jaxtrain.data.nulls import left_out_warning, without_arrow_fillings

log = logging.getLogger(__name__)

T = TypeVar("T")


class Source:
    """All rows of a `SourceSection`, under our column names."""

    def __init__(self, section: SourceSection, *, keep_columns: bool = False):
        """`keep_columns` keeps columns that are not mapped in the rows, for reward functions to read.

        Raises DataError for missing or broken files, for no rows at all, and for unknown names in `columns`.
        """
        if not keep_columns:
            _check_column_map(section.columns)
        self.section, self._keep_columns = section, keep_columns
        self._columns = {ours: theirs for ours, theirs in section.columns.items() if theirs is not None}
        self._unread = section.columns.keys() - self._columns.keys()
        self.left_out: set[str] = set()  # columns that `section.columns` left out of a row
        self._warned = False
        self._files: list[Rows] = []
        self._names: list[str] = []
        self._ends: list[int] = []  # the number of rows up to the end of each file
        if section.source is not None:
            self._add(section.path, given_rows(section.path, section.source, section.args, section.limit))
        elif section.rows is not None:
            self._add(section.path, GivenRows(section.path, section.rows, section.limit))
        else:
            self._open_files()
        if not len(self):
            raise DataError(f"{section.path}: holds no rows")
        if self.stream is not None and (section.epochs or 1) > 1:
            raise DataError(
                f"{section.path}: a stream is read once; for epochs={section.epochs} return a sequence or a grain "
                "MapDataset, or repeat in the function"
            )

    @property
    def files(self) -> list[str]:
        """The names of the files that are read, in order; none of rows that a program gives."""
        return [] if self.section.source is not None or self.section.rows is not None else list(self._names)

    def _open_files(self) -> None:
        section = self.section
        if section.path.startswith((ROWS_PREFIX, SOURCE_PREFIX)):
            given = "these rows were" if section.path.startswith(ROWS_PREFIX) else "this function was"
            raise DataError(f"{section.path}: {given} given by a program; start the run from it, with the same ones")
        names = find_files(section.path, config=section.config, split=section.split)
        for name in names:
            left = None if section.limit is None else section.limit - len(self)
            if left == 0:
                break
            rows = open_rows(name, left, len(names))
            check_types(name, {ours: rows.types[theirs] for ours, theirs in self._named(rows.types).items()})
            self._add(name, rows)

    def _named(self, columns: Collection[str]) -> dict[str, str]:
        """Our name -> the file's, of columns that a file has."""
        named = {name: name for name in columns if name not in {*self._columns.values(), *self._unread}}
        return named | {ours: theirs for ours, theirs in self._columns.items() if theirs in columns}

    def _add(self, name: str, rows: Rows) -> None:
        self._names.append(name)
        self._files.append(rows)
        self._ends.append(len(rows) + (self._ends[-1] if self._ends else 0))

    @property
    def stream(self) -> StreamRows | None:
        """The rows, where they are an iterable's, which have an order of their own and are read once."""
        return self._files[0] if self._files and isinstance(self._files[0], StreamRows) else None

    def __len__(self) -> int:
        """Of a stream, `ENDLESS` until its end was seen."""
        if self.stream is not None:
            return len(self.stream)
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """As `read`."""
        return self.read(index)[0]

    def read(self, index: int) -> tuple[Row, tuple[str, ...]]:
        """A row, and the counters that reading it adds to.

        Raises DataError that names file and line where the row cannot be read or lacks a mapped column, and
        StreamEndError where a stream ends before it.
        """
        rows, local = self._locate(index)
        row, guessed = rows[local], []
        if rows.types:
            names = {ours: self._columns.get(ours, ours) for ours in RENDERED_COLUMNS}
            tools = None
            for ours, theirs in names.items():
                if theirs in row:
                    row[theirs] = without_arrow_fillings(row[theirs], rows.types[theirs], tools, guessed)
                    tools = tools or (row[theirs] if ours in ("tools", "functions") else None)
        missing = [theirs for theirs in self._columns.values() if theirs not in row]
        if missing:
            raise DataError(f"{rows.place(local)}: there is no column {missing[0]!r}" + suggest(missing[0], list(row)))
        events = ("nulls_left_out",) if guessed else ()
        if guessed and not self._warned:
            self._warned = True
            warnings.warn(f"{self.section.path}: {left_out_warning(guessed)}", stacklevel=2)
        if not self.section.columns:
            return row, events
        if self._unread:
            mapped = self._columns.values()
            row = {name: value for name, value in row.items() if name not in self._unread or name in mapped}
        if self._keep_columns:
            return row | {ours: row[theirs] for ours, theirs in self._columns.items()}, events
        renamed = rename_columns(row, self._columns)
        self.left_out.update(column for column, value in row.items() if column not in renamed and value is not None)
        return renamed, events

    def make(self, index: int, function: Callable[[Row], T]) -> T:
        """`function` of a row. Raises DataError that names file and line for any fault of the row, a ValueError of
        `function` included.
        """
        row = self[index]
        try:
            return function(row)
        except ValueError as error:
            raise DataError(f"{self.place(index)}: {error}") from error

    def indices(self) -> Iterator[int]:
        """Of all rows in order; of a stream, until its end is seen."""
        index = 0
        while index < len(self):
            yield index
            index += 1

    def block_ends(self) -> np.ndarray:
        """Numbers of rows [blocks] int64 up to the end of each block: rows that are read in one go."""
        starts = [0, *self._ends[:-1]]
        return np.concatenate([rows.block_ends + start for rows, start in zip(self._files, starts, strict=True)])

    def read_together(self, windows: Sequence[np.ndarray]) -> None:
        """`windows`: numbers of blocks that are read at about the same time."""
        first = 0
        for rows in self._files:
            last = first + len(rows.block_ends)
            if isinstance(rows, ParquetRows):
                rows.read_together([(each[(each >= first) & (each < last)] - first).tolist() for each in windows])
            first = last

    @property
    def block_bytes(self) -> int:
        """Of the blocks of files of which reading one row costs reading its block."""
        return sum(rows.block_bytes for rows in self._files)

    def fingerprint(self) -> list[dict[str, Any]]:
        """JSON-able: of every file, in order, its name, rows, bytes and a hash."""
        if self.section.rows is not None:
            return [{"path": self.section.path, "rows": len(self), "bytes": 0, "hash": self.section.path}]
        if isinstance(given := self._files[0], SequenceRows | StreamRows):
            rows = 0 if self.stream is not None else len(self)
            return [{"path": self.section.path, "rows": rows, "bytes": 0, "hash": given.digest()}]
        blobs = [open_blob(name) for name in self._names]
        return [
            {"path": blob.name, "rows": len(rows), "bytes": blob.size, "hash": blob.digest()}
            for blob, rows in zip(blobs, self._files, strict=True)
        ]

    def place(self, index: int) -> str:
        """The place of a row, as an error names it: `file:line`."""
        rows, local = self._locate(index)
        return rows.place(local)

    def _locate(self, index: int) -> tuple[Rows, int]:
        if self.stream is not None:
            return self.stream, index
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect_right(self._ends, index)
        return self._files[file], index - (self._ends[file - 1] if file else 0)


def _check_column_map(columns: dict[str, str | None]) -> None:
    for ours, theirs in columns.items():
        if theirs is not None and ours not in COLUMNS:
            raise DataError(
                f"columns: {ours!r} is not one of our columns{suggest(ours, list(COLUMNS))}; "
                "a map is written ours: theirs"
            )


def read_rows(section: SourceSection) -> Iterator[Row]:
    """All rows once, in the order of the files."""
    source = Source(section)
    for index in source.indices():
        try:
            yield source[index]
        except StreamEndError:
            return
