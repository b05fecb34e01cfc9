"""Random access to the rows of JSON-lines and Parquet files, and of lists that a program gives.

A training run reads rows in shuffled order, so every file must support access by index. Plain JSON lines are
memory-mapped, and only the offsets of their lines are held. Files without random access (gzip, zstd, Parquet) are
unpacked once, piece by piece, into an unnamed temporary file that the system removes with the process, and that file
is memory-mapped. Memory use stays small either way.
"""

from __future__ import annotations

import copy
import difflib
import glob
import json
import mmap
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxtrain.config import ROWS, SourceSection
from jaxtrain.data.columns import COLUMNS, RENDERED_COLUMNS, Row, rename_columns
from jaxtrain.data.nulls import without_arrow_fillings

T = TypeVar("T")

_SCAN_BYTES, _UNPACK_BYTES = 1 << 26, 1 << 20
_WHITESPACE = np.frombuffer(b" \t\r\n\v\f", np.uint8)  # what bytes.strip removes


class DataError(ValueError):
    """Data that cannot be trained on. The message names the file and, where there is one, the line."""


class Rows(Protocol):
    """One file's rows."""

    types: Mapping[str, pa.DataType]  # of its columns; empty where the file declares none

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """Raises DataError where the row cannot be read or is no JSON object."""
        ...

    def place(self, index: int) -> str:
        """Where a row stands, as an error names it: `file:line`."""
        ...


class Source:
    """All rows of a `SourceSection`, under our column names."""

    def __init__(self, section: SourceSection, *, keep_columns: bool = False):
        """`keep_columns` keeps columns that are not mapped in the rows, for reward functions to read.

        Raises DataError for missing or broken files, for no rows at all, and for unknown names in `columns`.
        """
        if not keep_columns:
            _check_column_map(section.columns)
        self.section, self._keep_columns = section, keep_columns
        self._files: list[Rows] = []
        self._paths: list[Path] = []
        self._ends: list[int] = []  # the number of rows up to the end of each file
        if section.rows is not None:
            rows = section.rows[: section.limit]
            self._files, self._paths, self._ends = [_GivenRows(section.path, rows)], [Path(section.path)], [len(rows)]
            return
        for path in find_files(section.path):
            left = None if section.limit is None else section.limit - len(self)
            if left == 0:
                break
            self._files.append(_open_rows(path, left))
            self._paths.append(path)
            self._ends.append(len(self) + len(self._files[-1]))
        if not len(self):
            raise DataError(f"{section.path}: holds no rows")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """Raises DataError that names file and line where the row cannot be read or lacks a mapped column."""
        rows, local = self._locate(index)
        row = rows[local]
        for ours in RENDERED_COLUMNS if rows.types else ():
            theirs = self.section.columns.get(ours, ours)
            if theirs in row:
                row[theirs] = without_arrow_fillings(row[theirs], rows.types[theirs])
        missing = [theirs for theirs in self.section.columns.values() if theirs not in row]
        if missing:
            raise DataError(f"{rows.place(local)}: there is no column {missing[0]!r}" + _nearest(missing[0], list(row)))
        if self._keep_columns:
            return row | {ours: row[theirs] for ours, theirs in self.section.columns.items()}
        return rename_columns(row, self.section.columns)

    def make(self, index: int, function: Callable[[Row], T]) -> T:
        """`function` of a row. Raises DataError that names file and line for any fault of the row, a ValueError of
        `function` included.
        """
        row = self[index]
        try:
            return function(row)
        except ValueError as error:
            raise DataError(f"{self.place(index)}: {error}") from error

    @property
    def files(self) -> list[tuple[Path, int]]:
        """The files in order, each with the number of its rows."""
        return [(path, len(rows)) for path, rows in zip(self._paths, self._files, strict=True)]

    def place(self, index: int) -> str:
        """Where a row stands, as an error names it: `file:line`."""
        rows, local = self._locate(index)
        return rows.place(local)

    def _locate(self, index: int) -> tuple[Rows, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect_right(self._ends, index)
        return self._files[file], index - (self._ends[file - 1] if file else 0)


def find_files(path: str) -> list[Path]:
    """The files behind a file name, a folder (all data files in it) or a glob, sorted. Raises DataError if none."""
    if path.startswith(ROWS):
        raise DataError(f"{path}: these rows were given by a program; start the run from it, with the same rows")
    where = Path(path)
    if where.is_file():
        if _reader(where) is None:
            raise DataError(f"{path}: unknown kind of file; known: {', '.join(_READERS)}")
        return [where]
    if where.is_dir():
        found = [file for file in sorted(where.rglob("*")) if file.is_file() and _reader(file)]
        if not found:
            raise DataError(f"{path}: the folder holds no data file ({', '.join(_READERS)})")
        return found
    found = [Path(file) for file in sorted(glob.glob(path, recursive=True)) if _reader(Path(file))]
    if not found:
        raise DataError(f"{path}: no such file" + _nearest_file(where))
    return found


def _check_column_map(columns: dict[str, str]) -> None:
    for ours in columns:
        if ours not in COLUMNS:
            raise DataError(
                f"columns: {ours!r} is no column of ours{_nearest(ours, list(COLUMNS))}; a map is written ours: theirs"
            )


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(map(repr, known))}"


def _nearest_file(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if folder != path.parent:
        return f" (the nearest folder that exists is {folder})"
    near = difflib.get_close_matches(path.name, [file.name for file in folder.iterdir()], 1, cutoff=0.4)
    return f"; did you mean {folder / near[0]}?" if near else f" in the folder {folder}"


class _JsonLines:
    types: Mapping[str, pa.DataType] = {}

    def __init__(self, path: Path, file: IO[bytes], limit: int | None):
        self._path = path
        size = file.seek(0, 2)
        self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        starts = _line_starts(self._bytes, None if limit is None else limit + 1)
        # One start more than there are rows: where the last of them ends.
        self._starts = starts if limit is not None and len(starts) > limit else np.append(starts, size)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Row:
        line = self._bytes[self._starts[index] : self._starts[index + 1]]
        try:
            row = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise DataError(f"{self.place(index)}: broken JSON: {error.msg} at character {error.pos + 1}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{self.place(index)}: no UTF-8: {error.reason} at byte {error.start + 1}") from None
        except ValueError as error:  # an integer of more digits than Python reads
            raise DataError(f"{self.place(index)}: a number that cannot be read: {error}") from None
        except RecursionError:
            raise DataError(f"{self.place(index)}: brackets are nested too deeply to be read") from None
        if not isinstance(row, dict):
            raise DataError(f"{self.place(index)}: a row must be a JSON object, not {type(row).__name__}")
        return row

    def place(self, index: int) -> str:
        start = int(self._starts[index])
        blocks = range(0, start, _SCAN_BYTES)
        line = 1 + sum(self._bytes[at : min(at + _SCAN_BYTES, start)].count(b"\n") for at in blocks)
        return f"{self._path}:{line}"


def _line_starts(data: mmap.mmap | bytes, most: int | None) -> np.ndarray:
    """Offsets [rows] int64 of the lines that are not blank, of the first `most` only."""
    parts, rows, start = [], 0, 0  # `start`: of the first line that begins in the block, or before it
    for at in range(0, len(data), _SCAN_BYTES):
        block = np.frombuffer(data, np.uint8, min(_SCAN_BYTES, len(data) - at), at)
        ends = np.flatnonzero(block == ord("\n")) + at + 1
        starts = np.append(start, ends)
        starts, start = starts[:-1], int(starts[-1])
        parts.append(_not_blank(data, starts, ends))
        rows += len(parts[-1])
        if most is not None and rows >= most:
            break
    else:
        if start < len(data):  # the last line has no line break
            parts.append(_not_blank(data, np.array([start]), np.array([len(data)])))
    return np.concatenate([np.zeros(0, np.int64), *parts])[:most]


def _not_blank(data: mmap.mmap | bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """`starts` [n] of lines that end at `ends` [n], without those of lines that are only whitespace."""
    suspects = np.flatnonzero(np.isin(np.frombuffer(data, np.uint8)[starts], _WHITESPACE))
    return np.delete(starts, [i for i in suspects if not data[starts[i] : ends[i]].strip()])


class _GivenRows:
    types: Mapping[str, pa.DataType] = {}

    def __init__(self, name: str, rows: tuple[Row, ...]):
        self._name, self._rows = name, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return copy.deepcopy(self._rows[index])  # as a file does: whoever reads a row may change it

    def place(self, index: int) -> str:
        return f"{self._name}:row {index + 1}"


class _ParquetRows:
    def __init__(self, path: Path, limit: int | None):
        self._path = path
        self._batches = _unpack_parquet(path, limit)
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])
        self.types = {field.name: field.type for field in self._batches[0].schema} if self._batches else {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Row:
        batch = int(np.searchsorted(self._ends, index, side="right"))
        local = index - (int(self._ends[batch - 1]) if batch else 0)
        try:
            (row,) = self._batches[batch].slice(local, 1).to_pylist(maps_as_pydicts="strict")
        except (ValueError, KeyError, OverflowError, pa.ArrowException) as error:  # no UTF-8, a key twice, no such date
            raise DataError(f"{self.place(index)}: a value that cannot be read: {error}") from None
        return row

    def place(self, index: int) -> str:
        return f"{self._path}:row {index + 1}"


def _unpack_parquet(path: Path, limit: int | None) -> list[pa.RecordBatch]:
    """The first `limit` rows as memory-mapped Arrow batches."""
    left = limit
    with tempfile.TemporaryFile() as file:
        try:
            parquet = pq.ParquetFile(path, memory_map=True)
            with pa.ipc.new_file(file, parquet.schema_arrow) as writer:
                for batch in parquet.iter_batches(batch_size=1024):
                    writer.write_batch(batch if left is None else batch.slice(0, left))
                    left = left and max(0, left - batch.num_rows)
                    if left == 0:
                        break
        except pa.ArrowException as error:
            raise DataError(f"{path}: broken Parquet file: {error}") from None
        file.flush()
        reader = pa.ipc.open_file(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    return [reader.get_batch(index) for index in range(reader.num_record_batches)]


def _plain(path: Path, limit: int | None) -> Rows:
    with path.open("rb") as file:
        return _JsonLines(path, file, limit)


def _compressed(path: Path, limit: int | None) -> Rows:
    with tempfile.TemporaryFile() as file, pa.OSFile(str(path)) as packed:
        for block in _unpacked(path, packed):
            file.write(block)
        file.flush()
        return _JsonLines(path, file, limit)


def _unpacked(path: Path, packed: pa.NativeFile) -> Iterator[bytes]:
    stream = pa.CompressedInputStream(packed, "zstd" if path.suffix == ".zst" else "gzip")
    try:
        while block := stream.read(_UNPACK_BYTES):
            yield block
    except OSError as error:
        raise DataError(f"{path}: broken compressed file: {error}") from None


_READERS = {".jsonl": _plain, ".jsonl.gz": _compressed, ".jsonl.zst": _compressed, ".parquet": _ParquetRows}


def _reader(path: Path):
    return next((reader for suffix, reader in _READERS.items() if path.name.endswith(suffix)), None)


def _open_rows(path: Path, limit: int | None) -> Rows:
    reader = _reader(path)
    assert reader is not None, path
    return reader(path, limit)


def read_rows(section: SourceSection) -> Iterator[Row]:
    """All rows once, in the order of the files."""
    source = Source(section)
    for index in range(len(source)):
        yield source[index]
