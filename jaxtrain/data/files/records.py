"""ArrayRecord files, read by grain's data source: records that are JSON objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from jaxtrain.data.columns import Row
from jaxtrain.data.files.blobs import OPEN_FILES, LocalBlob, StoredBlob
from jaxtrain.data.files.errors import DataError

_BLOCK_BYTES = 8 << 20
_PICKLE = b"\x80"  # the first byte since protocol 2


class ArrayRecordRows:
    types: Mapping[str, pa.DataType] = {}
    block_bytes = 0

    def __init__(self, blob: StoredBlob, limit: int | None):
        from grain.sources import ArrayRecordDataSource  # imports jax, which other files are read without

        if not isinstance(blob, LocalBlob):
            raise DataError(
                f"{blob.name}: ArrayRecord files are read from local folders only: copy the file, or write "
                "Parquet or JSON lines, which are read by ranges"
            )
        self._blob, self._name, self._size = blob, blob.name, blob.size
        try:
            found: Any = ArrayRecordDataSource([blob.name])
            self._records = len(found)
        except (ValueError, RuntimeError, OSError) as error:
            raise DataError(f"{blob.name}: broken ArrayRecord file: {error}") from None
        self._rows = self._records if limit is None else min(self._records, limit)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> Row:
        try:
            record = _open_records(self._blob, self._records)[index]
        except (ValueError, RuntimeError) as error:
            raise DataError(f"{self.place(index)}: broken record: {error}") from None
        try:
            row = json.loads(record)
        except (ValueError, RecursionError) as error:
            kind = "a pickle" if record[:1] == _PICKLE else f"no JSON ({error})"
            raise DataError(
                f"{self.place(index)}: the record is {kind}: records must be JSON objects; others, such as pickles and "
                "tf.train.Example, are read by a custom function, which data.train.source names"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{self.place(index)}: a row must be a JSON object, not {type(row).__name__}")
        return row

    @property
    def block_ends(self) -> np.ndarray:
        each = max(1, _BLOCK_BYTES * self._rows // max(self._size, 1))
        return np.append(np.arange(each, self._rows, each), self._rows)

    def place(self, index: int) -> str:
        return f"{self._name}:record {index + 1}"


class _AllRecords(NamedTuple):
    """What grain takes in the place of a path, so that it does not count the records again."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


@lru_cache(OPEN_FILES // 2)
def _open_records(blob: LocalBlob, records: int) -> Any:
    """Opened again where too many others were since."""
    from grain.sources import ArrayRecordDataSource

    blob.check_unchanged()
    every: Any = _AllRecords(blob.name, 0, records, records)
    return ArrayRecordDataSource([every])
