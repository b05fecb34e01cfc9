"""What a reader of a format offers: the rows of a file by index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import pyarrow as pa

from jaxtrain.data.columns import Row


class Rows(Protocol):
    """One file's rows. Safe to use from several threads."""

    @property
    def types(self) -> Mapping[str, pa.DataType]:
        """Of the columns; empty where the file declares none."""
        ...

    @property
    def block_bytes(self) -> int:
        """Of all blocks, where reading one row costs reading its block; else 0."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row:
        """Raises DataError where the row cannot be read or is not a JSON object."""
        ...

    @property
    def block_ends(self) -> np.ndarray:
        """Numbers of rows [blocks] int64 up to the end of each block: about 8 MiB of rows that are read in one go."""
        ...

    def place(self, index: int) -> str:
        """The place of a row, as an error names it: `file:line`."""
        ...
