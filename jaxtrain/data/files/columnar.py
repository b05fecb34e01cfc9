"""Rows of Parquet and Arrow files by index, decoded piece by piece; pieces are held in the cache.

Parquet: a piece is a run of rows of one row group, about 8 MiB when decoded. A row group is decoded from its beginning,
so a piece in the middle of a large one costs those before it; pieces that are read in order cost nothing more.
Arrow: a piece is a record batch.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxtrain.data.columns import FORMATS, Row
from jaxtrain.data.files.blobs import OPEN_FILES, LocalBlob, StoredBlob, arrow_file
from jaxtrain.data.files.errors import DataError
from jaxtrain.data.files.read_cache import CACHE

_PIECE_BYTES, _PIECE_ROWS = 8 << 20, 1 << 14
_SAMPLE_ROWS = 64  # that are decoded when a file is opened, to learn how much larger its columns then are
_BUFFER_BYTES = 1 << 20  # of each column, compressed
_ARROW_FILE = b"ARROW1"


class ColumnarRows(ABC):
    """Rows in pieces. A subclass decodes a piece."""

    types: Mapping[str, pa.DataType]
    block_bytes: int

    def __init__(self, blob: StoredBlob, schema: pa.Schema, counts: list[int], limit: int | None):
        """`counts`: the rows of each piece. Raises DataError for a column that is there twice."""
        twice = [name for number, name in enumerate(schema.names) if name in schema.names[:number]]
        if twice:
            raise DataError(f"{blob.name}: there are several columns {twice[0]!r}, of which a row can hold one")
        self._blob, self._number = blob, CACHE.number()
        self.types = {field.name: field.type for field in schema}
        ends = np.cumsum(counts, dtype=np.int64)
        rows = int(ends[-1]) if len(ends) else 0
        self._rows = rows if limit is None else min(rows, limit)
        self.block_ends = np.minimum(ends[: int(np.searchsorted(ends, self._rows)) + 1], self._rows)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> Row:
        piece = int(np.searchsorted(self.block_ends, index, side="right"))
        local = index - (int(self.block_ends[piece - 1]) if piece else 0)
        batch = CACHE.get((self._number, piece), lambda: self._load(piece))
        try:
            (row,) = batch.slice(local, 1).to_pylist(maps_as_pydicts="strict")
        except (
            ValueError,
            KeyError,
            OverflowError,
            pa.ArrowException,
        ) as error:  # invalid UTF-8, a key twice, no such date
            raise DataError(f"{self.place(index)}: a value that cannot be read: {error}") from None
        return row

    def place(self, index: int) -> str:
        return f"{self._blob.name}:row {index + 1}"

    def _load(self, piece: int) -> tuple[pa.RecordBatch, int]:
        try:
            batch = self._decode(piece)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._blob.name}: broken file: {error}") from None
        return batch, batch.nbytes

    @abstractmethod
    def _decode(self, piece: int) -> pa.RecordBatch: ...


class ParquetRows(ColumnarRows):
    def __init__(self, blob: StoredBlob, limit: int | None):
        self._blob = blob
        try:
            self._metadata = pq.read_metadata(arrow_file(blob))
            schema = self._metadata.schema.to_arrow_schema()
            growth = self._growth()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{blob.name}: broken Parquet file: {error}") from None
        self._piece_rows: list[int] = []  # of each row group
        self._pieces: list[tuple[int, int]] = []  # row group, and which piece of it
        counts: list[int] = []
        for group in range(self._metadata.num_row_groups):
            found = self._metadata.row_group(group)
            rows, size = found.num_rows, max(int(growth * found.total_byte_size), 1)
            each = max(1, min(rows, _PIECE_ROWS, rows * _PIECE_BYTES // size))
            starts = range(0, rows, each)
            self._piece_rows.append(each)
            self._pieces += [(group, piece) for piece in range(len(starts))]
            counts += [min(each, rows - start) for start in starts]
        self._lock = threading.Lock()
        self._together: dict[int, list[int]] = {}
        self._open: tuple[int, int, Iterator[pa.RecordBatch]] | None = None  # row group, its next piece, the pieces
        encoded = sum(self._metadata.row_group(group).total_byte_size for group in range(len(self._piece_rows)))
        self.block_bytes = int(growth * encoded)
        super().__init__(blob, schema, counts, limit)

    def read_together(self, windows: Sequence[Sequence[int]]) -> None:
        """Decode the pieces of a window in one pass when the first of them is asked for."""
        self._together = {piece: sorted(window) for window in windows for piece in window}

    def _decode(self, piece: int) -> pa.RecordBatch:
        with self._lock:
            if (held := CACHE.peek((self._number, piece))) is not None:  # another thread has just passed it
                return held
            found = None
            for other in self._together.get(piece, [piece]):
                if other == piece:
                    found = self._reach(piece)
                elif CACHE.peek((self._number, other)) is None:
                    batch = self._reach(other)
                    CACHE.put((self._number, other), batch, batch.nbytes)
            assert found is not None
            return found

    def _reach(self, piece: int) -> pa.RecordBatch:
        """Decode the row group up to a piece, from where its last reading ended or from its beginning."""
        group, wanted = self._pieces[piece]
        if self._open is None or self._open[0] != group or self._open[1] > wanted:
            self._open = group, 0, self._batches(group, self._piece_rows[group])
        _, following, batches = self._open
        for number in range(following, wanted):  # passed on the way
            batch = next(batches)
            CACHE.put((self._number, piece - wanted + number), batch, batch.nbytes, if_room=True)
        batch = next(batches)
        self._open = group, wanted + 1, batches
        return batch

    def _batches(self, group: int, rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of a row group, so many at a time."""
        # Without a buffer, and with what Arrow fetches ahead, it would hold the whole row group.
        options = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}
        file = pq.ParquetFile(arrow_file(self._blob), metadata=self._metadata, **options)
        return file.iter_batches(rows, row_groups=[group])

    def _growth(self) -> float:
        """How many times larger rows are when decoded than in the file's metadata, which counts a text of a
        dictionary once however often it occurs. Estimated from the first rows of the file."""
        first = self._metadata.row_group(0) if self._metadata.num_row_groups else None
        columns = [first.column(number) for number in range(first.num_columns)] if first and first.num_rows else []
        if first is None or not any(c.has_dictionary_page and c.physical_type == "BYTE_ARRAY" for c in columns):
            return 1.0
        sample = next(self._batches(0, _SAMPLE_ROWS))
        return max(1.0, sample.nbytes / sample.num_rows * first.num_rows / max(first.total_byte_size, 1))


class ArrowRows(ColumnarRows):
    """An Arrow file, or a stream, as `datasets` writes it."""

    def __init__(self, blob: StoredBlob, limit: int | None):
        self._lock = threading.Lock()
        self._offsets: list[int] = []  # of the record batches of a stream
        try:
            opened = _open_arrow(blob)
            if opened.reader is not None:
                schema, numbers = opened.reader.schema, range(opened.reader.num_record_batches)
                counts = [opened.reader.get_batch(number).num_rows for number in numbers]
            else:
                schema, counts = self._scan_stream(blob, opened.file)
        except (pa.ArrowException, OSError, EOFError) as error:
            raise DataError(f"{blob.name}: broken Arrow file: {error}") from None
        self._schema = schema
        self.block_bytes = 0 if isinstance(opened.file, pa.MemoryMappedFile) else blob.size
        super().__init__(blob, schema, counts, limit)

    def _scan_stream(self, blob: StoredBlob, file: pa.NativeFile) -> tuple[pa.Schema, list[int]]:
        schema = pa.ipc.read_schema(file)
        counts = []
        while (offset := file.tell()) < blob.size:
            try:
                message = pa.ipc.read_message(file)
            except EOFError:  # the mark of the end
                break
            if message.type != "record batch":
                raise DataError(
                    f"{blob.name}: {message.type} messages in an Arrow stream are not supported: write an Arrow file "
                    "or Parquet"
                )
            self._offsets.append(offset)
            counts.append(pa.ipc.read_record_batch(message, schema).num_rows)
        return schema, counts

    def _decode(self, piece: int) -> pa.RecordBatch:
        with self._lock:
            opened = _open_arrow(self._blob)
            if opened.reader is not None:
                return opened.reader.get_batch(piece)
            opened.file.seek(self._offsets[piece])
            return pa.ipc.read_record_batch(pa.ipc.read_message(opened.file), self._schema)


class _OpenArrow(NamedTuple):
    file: pa.NativeFile
    reader: pa.ipc.RecordBatchFileReader | None  # None: a stream


@lru_cache(OPEN_FILES // 2)
def _open_arrow(blob: StoredBlob) -> _OpenArrow:
    """Opened again where too many others were since; a batch that was read stays valid."""
    file = arrow_file(blob)
    if isinstance(blob, LocalBlob) and blob.size:
        blob.check_unchanged()
        # A map costs no copy, and its pages are the system's to drop; a compressed batch is decoded into memory.
        file = pa.memory_map(blob.name)
    is_file = blob.read(0, len(_ARROW_FILE)) == _ARROW_FILE
    return _OpenArrow(file, pa.ipc.open_file(file) if is_file else None)


def check_types(name: str, types: Mapping[str, pa.DataType]) -> None:
    """`types` are those of a file's columns, under our names. Raises DataError for bytes where text is read."""
    kind = next((columns for columns in FORMATS.values() if types.keys() >= set(columns)), ())
    for column in kind:
        if _holds_bytes(types[column]):
            raise DataError(
                f"{name}: the column {column!r} holds bytes ({types[column]}), and text is needed: write it as "
                "strings, e.g. with pyarrow's `column.cast(pyarrow.string())`, which decodes UTF-8"
            )


def _holds_bytes(kind: pa.DataType) -> bool:
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return binary or pa.types.is_binary_view(kind) or any(map(_holds_bytes, inner))
