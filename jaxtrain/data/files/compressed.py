"""Random access to gzip and zstd files: decompression starts again at points that the first pass has noted.

- gzip: a point is the start of a member, or a copy of zlib's state (about 40 KiB) in the middle of one.
- zstd: a point is the start of a frame, since the decoder's state cannot be copied. A frame that is long, such as the
  only one that `zstd FILE` writes, is compressed again, in short frames, into an unnamed temporary file, one for all
  files, which is about as large as the originals and which the system removes with the process. This is logged.

What was decompressed between two points is held in the cache.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import zstandard

from jaxtrain.data.files.blobs import StoredBlob
from jaxtrain.data.files.errors import DataError
from jaxtrain.data.files.read_cache import CACHE

log = logging.getLogger(__name__)

SUFFIXES = (".gz", ".zst")

_SPACING = 1 << 20  # bytes of content between two points, at least
_POINTS = 1024  # in all gzip files of a source together, at most: beyond, the spacing grows
_LONG_FRAME = 8 << 20
_FED, _OUTPUT = 1 << 16, 1 << 20  # bytes that a decoder takes, and gives, at a time
_READ, _READ_FIRST = 1 << 18, 1 << 22  # bytes of the file that are read at a time, by a segment and by the first pass
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)  # magic numbers of zstd frames without content


class _Point(NamedTuple):
    """Where decompression can begin."""

    content: int  # offset in the content
    file: _Readable
    offset: int  # in the file
    state: Any  # a decoder to copy, or None for a new one


class _Readable(Protocol):
    def read(self, start: int, stop: int) -> bytes: ...


class CompressedBlob:
    """The content of a compressed file. `read` returns only bytes that `blocks` has passed over before."""

    def __init__(self, stored: StoredBlob, kind: str, files: int):
        """`kind` ends with one of `SUFFIXES`. `files`: how many the source has; they share the memory for points."""
        self.name, self._stored = stored.name, stored
        self.is_zstd = kind.endswith(".zst")
        self._points: list[_Point] = []
        self._max_points, self._spacing = max(_POINTS // files, 8), _SPACING
        self._passed = 0  # bytes of content that the first pass has given
        self._number = CACHE.number()

    def read(self, start: int, stop: int) -> bytes:
        parts, at, stop = [], start, min(stop, self._passed)
        while at < stop:
            index = bisect_right(self._points, at, key=lambda point: point.content) - 1
            point = self._points[index]
            segment = CACHE.get((self._number, point.content), lambda index=index: self._segment(index))
            parts.append(segment[at - point.content : stop - point.content])
            at += len(parts[-1])
        return b"".join(parts)

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        """The first call passes over the file from its beginning; later ones read again what was passed over."""
        if self._passed:
            yield from (self.read(at, at + _OUTPUT) for at in range(start, self._passed, _OUTPUT))
            return
        for data in self._first_pass_of_zstd() if self.is_zstd else self._first_pass_of_gzip():
            self._passed += len(data)
            yield data

    def _segment(self, index: int) -> tuple[bytes, int]:
        """The content from a point up to the next one."""
        point = self._points[index]
        end = self._points[index + 1].content if index + 1 < len(self._points) else self._passed
        stream = _Stream(self, point, _READ)
        parts = []
        while (missing := end - point.content - sum(map(len, parts))) > 0:
            data = stream.next()
            if data is None:
                raise DataError(f"{self.name}: was changed while the run reads it")
            parts.append(data[:missing])
        content = b"".join(parts)
        return content, len(content)

    def _first_pass_of_gzip(self) -> Iterator[bytes]:
        stream, content = _Stream(self, _Point(0, self._stored, 0, None), _READ_FIRST), 0
        while True:
            if not self._points or content - self._points[-1].content >= self._spacing:
                self._points.append(stream.point(content))
                if len(self._points) > self._max_points:
                    self._points, self._spacing = self._points[::2], self._spacing * 2
            if (data := stream.next()) is None:
                return
            yield data
            content += len(data)

    def _first_pass_of_zstd(self) -> Iterator[bytes]:
        stream, content, spool = _Stream(self, _Point(0, self._stored, 0, None), _READ_FIRST), 0, None
        while True:
            point, parts, size = stream.point(content), [], 0
            while size <= _LONG_FRAME and (data := stream.next()) is not None:
                parts.append(data)
                size += len(data)
                if stream.between_frames:
                    break
            if not parts:
                return
            if size <= _LONG_FRAME:
                last = self._points[-1] if self._points else None
                if last is None or last.file is not self._stored or content - last.content >= self._spacing:
                    self._points.append(point)
                yield b"".join(parts)
                content += size
                continue
            if spool is None:
                spool = _shared_spool()
                log.info(
                    "%s: a zstd frame of more than %d MiB cannot be read from its middle, so it is compressed again in "
                    "short frames into a temporary file; gzip, Parquet or several frames (pzstd) need none",
                    *(self.name, _LONG_FRAME >> 20),
                )
            parts.reverse()  # taken from the end
            while parts or not stream.between_frames:
                data = parts.pop() if parts else stream.next()
                if data is None:
                    break
                self._points.append(_Point(content, spool, spool.add(data), None))
                yield data
                content += len(data)


class _Stream:
    """The content of a compressed file from a point on."""

    def __init__(self, blob: CompressedBlob, point: _Point, read: int):
        self._name, self._zstd, self._file = blob.name, blob.is_zstd, point.file
        self._decoder: Any = point.state.copy() if point.state is not None else None
        self._buffer, self._buffer_start, self._offset, self._read = b"", point.offset, point.offset, read

    @property
    def between_frames(self) -> bool:
        return self._decoder is None

    def point(self, content: int) -> _Point:
        """Where the stream is, after `content` bytes."""
        state = self._decoder.copy() if self._decoder is not None and not self._zstd else None
        return _Point(content, self._file, self._offset, state)

    def next(self) -> bytes | None:
        """The next piece, never empty; None at the end. Raises DataError for a file that is cut off or damaged."""
        while True:
            if self._decoder is None and not self._begin_frame():
                return None
            fed = self._peek(_FED)
            if not fed:
                raise DataError(f"{self._name}: broken compressed file: it is cut off")
            try:
                data, left = self._decode(fed)
            except (zlib.error, zstandard.ZstdError) as error:
                raise DataError(f"{self._name}: broken compressed file: {error}") from None
            self._offset += len(fed) - left
            if data:
                return data

    def _decode(self, fed: bytes) -> tuple[bytes, int]:
        """What the decoder makes of `fed`, and how many bytes of it are left."""
        decoder = self._decoder
        data = decoder.decompress(fed) if self._zstd else decoder.decompress(fed, _OUTPUT)
        if decoder.eof:
            self._decoder = None
            return data, len(decoder.unused_data)
        return data, 0 if self._zstd else len(decoder.unconsumed_tail)

    def _begin_frame(self) -> bool:
        """Go to the next frame with content. False at the end of the file."""
        while head := self._peek(8):
            if self._zstd and int.from_bytes(head[:4], "little") in _SKIPPABLE:
                self._offset += 8 + int.from_bytes(head[4:], "little")
            elif not self._zstd and head[:1] == b"\0" and self._offset:  # padding after a member
                self._offset += 1
            else:
                self._decoder = zstandard.ZstdDecompressor().decompressobj() if self._zstd else zlib.decompressobj(31)
                return True
        return False

    def _peek(self, size: int) -> bytes:
        """The next bytes of the file, fewer at its end."""
        at = self._offset - self._buffer_start
        if at + size > len(self._buffer):
            self._buffer, self._buffer_start, at = (
                self._file.read(self._offset, self._offset + self._read),
                self._offset,
                0,
            )
        return self._buffer[at : at + size]


class _Spool:
    """Pieces of content, each compressed as a separate frame, in an unnamed temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed, and so removed, with this object
        self._compressor, self._size = zstandard.ZstdCompressor(level=1), 0
        self._lock = threading.Lock()

    def add(self, content: bytes) -> int:
        """Append the content; returns its offset in the file, in bytes."""
        with self._lock:
            start, frame = self._size, self._compressor.compress(content)
            os.pwrite(self._file.fileno(), frame, start)
            self._size += len(frame)
        return start

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self._file.fileno(), stop - start, start)


_SPOOLS: WeakValueDictionary[str, _Spool] = WeakValueDictionary()


def _shared_spool() -> _Spool:
    """One for all files that are open, each of which may be one of thousands."""
    spool = _SPOOLS.get("shared") or _Spool()
    _SPOOLS["shared"] = spool
    return spool
