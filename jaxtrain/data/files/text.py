"""Rows of text files by index: JSON lines, JSON arrays and CSV, plain or compressed.

One pass notes where rows start. Of very many rows only every k-th start is kept, so that the memory for them is
bounded; the rows between are found again when they are read.
"""

from __future__ import annotations

import csv
import json
import re
import textwrap
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.csv

from jaxtrain.data.columns import Row
from jaxtrain.data.files.blobs import Blob, LocalBlob
from jaxtrain.data.files.errors import DataError

_MAX_STARTS = 1 << 23  # of a file: 64 MiB
_HEAD_BYTES = 1 << 20  # of the file, if it has so many, from which a header is read
_MAX_BYTES = 1 << 29  # of a row
_BLOCK_BYTES = 8 << 20
_BOM = b"\xef\xbb\xbf"
_COMPRESSED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}  # by how such files begin
_WHITESPACE = np.frombuffer(b" \t\r\n\v\f", np.uint8)  # what bytes.strip removes
_OPENING = np.isin(np.arange(256), list(b"{["))
_STRUCTURE = np.isin(np.arange(256), list(b'{}[]"'))


class TextRows(ABC):
    """Rows of a text file. A subclass defines where rows start and how one is parsed."""

    types: Mapping[str, pa.DataType] = {}  # JSON and CSV have no nested columns that Arrow would fill

    def __init__(self, blob: Blob, limit: int | None):
        self._blob = blob
        self._every, self._rows = 1, 0
        self._lines: list[tuple[int, int]] = []  # where each block of the scan started, and the lines before it
        self._starts, self._end = self._scan(limit)  # [rows / every] int64, and where the last row ends

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> Row:
        start, stop = self._span(index)
        return self._parse(self._blob.read(start, stop), index)

    @property
    def block_bytes(self) -> int:
        return 0 if isinstance(self._blob, LocalBlob) else self._end

    @property
    def block_ends(self) -> np.ndarray:
        each = max(1, _BLOCK_BYTES * self._rows // max(self._end, 1))
        return np.append(np.arange(each, self._rows, each), self._rows)

    def place(self, index: int) -> str:
        start = self._span(index)[0]
        block, lines = self._lines[bisect_right(self._lines, start, key=lambda line: line[0]) - 1]
        line = 1 + lines + self._blob.read(block, start).count(b"\n")
        return f"{self._blob.name}:{line}"

    def _begin(self, data: bytes) -> int:
        """The number of bytes before the first row. `data` are the first of the file."""
        return 0

    @abstractmethod
    def _split(self, data: bytes, final: bool) -> tuple[np.ndarray, int]:
        """The starts [n] int64 of the complete rows in `data`, which begins between rows, and that of the next one.

        `final`: `data` ends at the end of a row or of the file.
        """

    @abstractmethod
    def _parse(self, text: bytes, index: int) -> Row: ...

    def _is_complete(self, text: bytes) -> bool:
        """Whether a file ends as it must. `text`: from the start of its last row to its end."""
        return True

    def _span(self, index: int) -> tuple[int, int]:
        """Where a row starts and the next one does."""
        slot, within = divmod(index, self._every)
        start = int(self._starts[slot])
        stop = int(self._starts[slot + 1]) if slot + 1 < len(self._starts) else self._end
        if self._every == 1:
            return start, stop
        starts = [start + int(each) for each in self._split(self._blob.read(start, stop), True)[0][within:][:2]]
        return starts[0], starts[1] if len(starts) > 1 else stop

    def _scan(self, limit: int | None) -> tuple[np.ndarray, int]:
        kept, data, at, lines, started, last = [np.zeros(0, np.int64)], b"", 0, 0, False, None

        def note(final: bool) -> int:
            nonlocal lines, last
            starts, used = self._split(data, final)
            self._lines.append((at, lines))
            lines += data.count(b"\n", 0, used)
            kept.append(starts[-self._rows % self._every :: self._every] + at)
            self._rows += len(starts)
            last = int(starts[-1]) + at if len(starts) else last
            return used

        def begin() -> None:
            nonlocal at, started, lines, data
            if not started:
                _check_encoding(self._blob.name, data)
                at, started = self._begin(data), True
                lines, data = data.count(b"\n", 0, at), data[at:]

        for block in self._blob.blocks():
            data += block
            if not started and len(data) < _HEAD_BYTES:
                continue
            begin()
            used = note(False)
            data, at = data[used:], at + used
            if len(data) > _MAX_BYTES:
                raise DataError(
                    f"{self._blob.name}: from byte {at} on, {_MAX_BYTES >> 20} MiB make no complete row; is a line "
                    "break, a bracket or a quote missing?"
                )
            while sum(map(len, kept)) > _MAX_STARTS:
                kept, self._every = [np.concatenate(kept)[::2]], self._every * 2
            if limit is not None and self._rows > limit:
                break
        else:
            begin()
            note(True)
            if last is not None and not self._is_complete(self._blob.read(last, at + len(data))):
                raise DataError(f"{self._blob.name}: broken JSON: the array is not closed; the file may be cut off")
            at += len(data)
        starts = np.concatenate(kept)
        if limit is None or self._rows <= limit:
            return starts, at
        self._rows = limit
        slots = -(-limit // self._every)
        # The last group of rows may hold some beyond the limit, which are not read.
        return starts[:slots], int(starts[slots]) if slots < len(starts) else at


class JsonLines(TextRows):
    """A JSON object on each line that is not blank."""

    def _split(self, data: bytes, final: bool) -> tuple[np.ndarray, int]:
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
        if final and data and (not len(ends) or ends[-1] < len(data)):
            ends = np.append(ends, len(data))
        return _not_blank(data, ends), int(ends[-1]) if len(ends) else 0

    def _parse(self, text: bytes, index: int) -> Row:
        try:
            row = json.loads(text.rstrip())
        except (ValueError, RecursionError) as error:
            if text.strip() == b"{" or (isinstance(error, json.JSONDecodeError) and self._is_spread(text)):
                raise DataError(
                    f"{self.place(index)}: a JSON object over several lines, and a row must be on one: "
                    f"{self._one_line_each()}"
                ) from None
            raise self._fault(index, error) from None
        return self._checked(row, index)

    def _is_spread(self, text: bytes) -> bool:
        """Whether the file begins with an object that its first line `text` does not close."""
        if not text.lstrip(_BOM).startswith(b"{") or not text.endswith(b"\n"):
            return False
        head = self._blob.read(0, _HEAD_BYTES)
        try:
            _, end = _DECODER.raw_decode(head.removeprefix(_BOM).decode(errors="replace"))
        except ValueError:
            return False
        return head.startswith(text) and end > len(text.decode(errors="replace"))

    def _one_line_each(self) -> str:
        """What writes the rows as lines, of a file whose objects are spread over lines."""
        name = self._blob.name.rpartition("/")[2]
        try:
            found = json.loads(self._blob.read(0, _MAX_BYTES).removeprefix(_BOM))
        except ValueError:  # several objects, or cut off
            found = {}
        lists = [
            key for key, value in found.items() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        what = f".{json.dumps(lists[0])}[]" if len(lists) == 1 else "."
        inside = f" (the rows seem to be the list under {lists[0]!r})" if len(lists) == 1 else ""
        return f"`jq -c '{what}' {name} > rows.jsonl` writes it so{inside}"

    def _checked(self, row: object, index: int) -> Row:
        if not isinstance(row, dict):
            raise DataError(f"{self.place(index)}: a row must be a JSON object, not {type(row).__name__}")
        return row

    def _fault(self, index: int, error: Exception) -> DataError:
        place = self.place(index)
        if isinstance(error, json.JSONDecodeError):
            return DataError(f"{place}: broken JSON: {error.msg} at character {error.pos + 1}")
        if isinstance(error, UnicodeDecodeError):
            return DataError(
                f"{place}: invalid UTF-8: {error.reason} at byte {error.start + 1}; text in another "
                "encoding is converted by `iconv -f ENCODING -t UTF-8`"
            )
        if isinstance(error, RecursionError):
            return DataError(f"{place}: brackets are nested too deeply to be read")
        return DataError(
            f"{place}: a number that cannot be read: {error}"
        )  # an integer of more digits than Python reads


class JsonArray(JsonLines):
    """A JSON array of objects."""

    def _begin(self, data: bytes) -> int:
        begin = data.index(b"[") + 1
        if data[begin:].lstrip()[:1] not in (b"{", b"]", b""):
            raise DataError(f"{self._blob.name}: the elements of the array must be JSON objects")
        return begin

    def _split(self, data: bytes, final: bool) -> tuple[np.ndarray, int]:
        # Escaped quotes and backslashes are blanked, at the same length: every quote left begins or ends a text.
        plain = data.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in data else data
        text = np.frombuffer(plain, np.uint8)
        places = np.flatnonzero(_STRUCTURE[text])
        quotes = text[places] == ord('"')
        places = places[~quotes & (np.cumsum(quotes) % 2 == 0)]
        opening = _OPENING[text[places]]
        depths = np.cumsum(np.where(opening, 1, -1))
        closed = np.flatnonzero(depths < 0)  # the array's own bracket
        if len(closed):
            places, opening, depths = (each[: closed[0]] for each in (places, opening, depths))
        starts, ends = places[opening & (depths == 1)], places[~opening & (depths == 0)] + 1
        if final:
            return starts, len(data)
        return starts[: len(ends)], int(ends[-1]) if len(ends) else 0

    def _parse(self, text: bytes, index: int) -> Row:
        try:
            decoded = text.decode()
            row, end = _DECODER.raw_decode(decoded)
        except (ValueError, RecursionError) as error:
            raise self._fault(index, error) from None
        if decoded[end:].strip() not in (",", "]"):
            raise DataError(f"{self.place(index)}: the row must be followed by a comma and the next object, or by `]`")
        return self._checked(row, index)

    def _is_complete(self, text: bytes) -> bool:
        return text.rstrip().endswith(b"]")


class Csv(TextRows):
    """Comma-separated values, quoted as in RFC 4180, below a header. All are text: the format has no types, and a
    number that is guessed from digits would lose the zeros of `007` and be refused as an answer."""

    def _begin(self, data: bytes) -> int:
        starts, used = self._split(data, False)
        if not len(starts):
            starts, used = self._split(data, True)
        if not len(starts):
            return 0
        end = int(starts[1]) if len(starts) > 1 else used
        header = data[int(starts[0]) : end].removeprefix(_BOM).decode(errors="replace")
        try:
            self._names = next(csv.reader([header]))
        except csv.Error as error:
            raise DataError(f"{self._blob.name}: the header cannot be read: {error}{_old_lines(header)}") from None
        doubtful = [name for name in self._names if not name.strip() or _is_number(name) or self._names.count(name) > 1]
        if doubtful:
            raise DataError(
                f"{self._blob.name}: the first line must be a header that names every column once; it has "
                f"{', '.join(map(repr, doubtful))}"
            )
        return end

    def _split(self, data: bytes, final: bool) -> tuple[np.ndarray, int]:
        text = np.frombuffer(data, np.uint8)
        places = np.flatnonzero((text == ord("\n")) | (text == ord('"')))
        quotes = text[places] == ord('"')
        ends = places[~quotes & (np.cumsum(quotes) % 2 == 0)] + 1
        if final and data and (not len(ends) or ends[-1] < len(data)):
            ends = np.append(ends, len(data))
        return _not_blank(data, ends), int(ends[-1]) if len(ends) else 0

    def _parse(self, text: bytes, index: int) -> Row:
        try:
            table = pyarrow.csv.read_csv(
                pa.py_buffer(text),
                pyarrow.csv.ReadOptions(use_threads=False, column_names=self._names, block_size=len(text) + 1),
                pyarrow.csv.ParseOptions(newlines_in_values=True),
                pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(self._names, pa.string())),
            )
        except pa.ArrowException as error:
            reason = textwrap.shorten(str(error), 300)
            lines = _old_lines(text.decode(errors="replace"))
            raise DataError(f"{self.place(index)}: a value that cannot be read: {reason}{lines}") from None
        if table.num_rows != 1:
            raise DataError(
                f"{self.place(index)}: a field with quotes in it must be quoted, and these quotes doubled (RFC 4180)"
            )
        return table.to_pylist()[0]


_DECODER = json.JSONDecoder()


def holds_array(blob: Blob) -> bool:
    """Whether a JSON file is an array. It starts the first pass over the blob, which cannot make another one."""
    starts = (block.removeprefix(_BOM).lstrip() for block in blob.blocks())
    return next((start[:1] == b"[" for start in starts if start), False)


def _check_encoding(name: str, data: bytes) -> None:
    """Raises DataError for a compressed file without the suffix of one, and for text of two or four bytes a character,
    which has a mark or a zero at its beginning."""
    for mark, suffix in _COMPRESSED.items():
        if data.startswith(mark):
            raise DataError(f"{name}: the file is compressed: give it a name that ends with {suffix}")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]:
        raise DataError(
            f"{name}: the file is UTF-16 or UTF-32 and must be UTF-8: `iconv -f UTF-16 -t UTF-8 FILE > OTHER` converts "
            "it (add LE or BE to UTF-16 where it begins without a mark)"
        )


def _old_lines(text: str) -> str:
    """What to do where lines end with a carriage return alone."""
    found = re.search(r"\r(?![\r\n])", text)
    return ": lines must end with a line feed, and `tr '\\r' '\\n'` makes them so" if found else ""


def _not_blank(data: bytes, ends: np.ndarray) -> np.ndarray:
    """Where the lines that end at `ends` [n] start, without those of lines that are only whitespace."""
    if not len(ends):
        return np.zeros(0, np.int64)
    starts = np.concatenate([[0], ends[:-1]])
    suspects = np.flatnonzero(np.isin(np.frombuffer(data, np.uint8)[starts], _WHITESPACE))
    return np.delete(starts, [i for i in suspects if not data[starts[i] : ends[i]].strip()])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
