"""Files as bytes by ranges: local ones by system calls, remote ones through fsspec with a cache of their blocks.

Local files are read and not memory-mapped, since mapped pages count as memory of the process until the system reclaims
them.
"""

import hashlib
import io
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import pyarrow as pa

from jaxtrain.data.files.errors import DataError
from jaxtrain.data.files.read_cache import CACHE
from jaxtrain.remote import RemoteError, remote_errors, version

SCAN_BYTES = 16 << 20  # read at a time when a whole file is scanned
_BLOCK = 1 << 19  # of a remote file, in the cache
_MAX_OPEN = 256  # local files at a time; a process may have about 1000, and a data set more files than that
_DIGEST_BLOCK, _DIGEST_BLOCKS = 1 << 16, 16


def _count_open_files() -> int:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_OPEN if allowed == resource.RLIM_INFINITY else max(min(_MAX_OPEN, allowed // 4), 1)


OPEN_FILES = _count_open_files()
"""Files that this module holds open at a time, at most. A reader that opens files itself may hold half as many."""


class Blob(Protocol):
    """The bytes of a file. Safe to use from several threads."""

    name: str  # as errors name it

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` up to `stop`, fewer at the end of the file."""
        ...

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        """All bytes from `start` on, piece by piece."""
        ...


class StoredBlob(Blob, Protocol):
    """A file as it is stored."""

    size: int

    def digest(self) -> str:
        """Changes with the content. It covers all of a local file of up to 1 MiB, else blocks spread over it."""
        ...


class LocalBlob:
    def __init__(self, path: str):
        self.name = path
        status = os.stat(path)
        self.size = status.st_size
        self._identity = _identity(status)

    def read(self, start: int, stop: int) -> bytes:
        descriptor = _open(self.name, self._identity)
        return os.pread(descriptor.number, max(min(stop, self.size) - start, 0), start)

    def check_unchanged(self) -> None:
        """Raise DataError where the name is that of another file by now: for readers that open it again."""
        _check_identity(self.name, os.stat(self.name), self._identity)

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        return _blocks(self, start)

    def digest(self) -> str:
        """An edit inside a large file that keeps its size may go unnoticed: reading all of it would take too long."""
        return _digest(self, _DIGEST_BLOCKS)


class RemoteBlob:
    def __init__(self, url: str, filesystem: Any, path: str):
        self.name, self._filesystem, self._path = url, filesystem, path
        with data_errors(url):
            self._info = filesystem.info(path)
        if not isinstance(self._info.get("size"), int):
            raise DataError(f"{url}: the server does not say how long the file is, so no part of it can be read alone")
        self.size: int = self._info["size"]
        self._number = CACHE.number()

    def read(self, start: int, stop: int) -> bytes:
        stop = min(stop, self.size)
        if stop <= start:
            return b""
        first, end = start // _BLOCK, -(-stop // _BLOCK)
        if end - first > 1:
            self._fetch_missing(first, end)
        parts = [
            CACHE.get((self._number, block), lambda block=block: self._block(block)) for block in range(first, end)
        ]
        return b"".join(parts)[start - first * _BLOCK : stop - first * _BLOCK]

    def _fetch_missing(self, first: int, end: int) -> None:
        """The blocks from the first to the last one that is missing, in one request."""
        missing = [block for block in range(first, end) if CACHE.peek((self._number, block)) is None]
        if len(missing) < 2:
            return
        data = self._range(missing[0] * _BLOCK, min((missing[-1] + 1) * _BLOCK, self.size))
        for at, block in enumerate(range(missing[0], missing[-1] + 1)):
            part = data[at * _BLOCK : (at + 1) * _BLOCK]
            CACHE.put((self._number, block), part, len(part))

    def _block(self, block: int) -> tuple[bytes, int]:
        data = self._range(block * _BLOCK, min((block + 1) * _BLOCK, self.size))
        return data, len(data)

    def _range(self, start: int, stop: int) -> bytes:
        with data_errors(self.name):
            data = self._filesystem.cat_file(self._path, start=start, end=stop)
        if len(data) != stop - start:
            raise DataError(
                f"{self.name}: of the bytes from {start} to {stop} the server sent {len(data)}: the file was changed "
                "while the run reads it, or the server has no range requests"
            )
        return data

    def blocks(self, start: int = 0) -> Iterator[bytes]:
        return _blocks(self, start)

    def digest(self) -> str:
        """Of the file's version as the server reports it; without one, of the file's first and last bytes."""
        found = version(self._info)
        return hashlib.sha256(repr((self.size, found)).encode()).hexdigest()[:16] if found else _digest(self, 2)


class BlobFile(io.RawIOBase):
    """A blob as a file object, as Arrow reads it."""

    def __init__(self, blob: StoredBlob):
        self._blob, self._at = blob, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._blob.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        data = self._blob.read(self._at, self._blob.size if size < 0 else self._at + size)
        self._at += len(data)
        return data


def arrow_file(blob: StoredBlob) -> pa.NativeFile:
    return pa.PythonFile(BlobFile(blob), mode="r")


@contextmanager
def data_errors(url: str) -> Iterator[None]:
    """Whatever a remote file system raises becomes a DataError that names the URL."""
    try:
        with remote_errors(url):
            yield
    except RemoteError as error:
        raise (error.__cause__ if isinstance(error.__cause__, DataError) else DataError(str(error))) from error


def _blocks(blob: StoredBlob, start: int) -> Iterator[bytes]:
    for at in range(start, blob.size, SCAN_BYTES):
        yield blob.read(at, at + SCAN_BYTES)


def _digest(blob: StoredBlob, count: int) -> str:
    last = max(blob.size - _DIGEST_BLOCK, 0)
    starts = sorted({last * block // (count - 1) for block in range(count)})
    if blob.size <= _DIGEST_BLOCK * count:
        starts = list(range(0, blob.size, _DIGEST_BLOCK))
    digest = hashlib.sha256()
    for start in starts:
        digest.update(blob.read(start, start + _DIGEST_BLOCK))
    return digest.hexdigest()[:16]


class _Descriptor:
    """An open file, closed when nobody holds it any more."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@lru_cache(OPEN_FILES)
def _open(path: str, identity: tuple[int, ...]) -> _Descriptor:
    descriptor = _Descriptor(os.open(path, os.O_RDONLY))
    _check_identity(path, os.fstat(descriptor.number), identity)
    return descriptor


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_identity(path: str, status: os.stat_result, identity: tuple[int, ...]) -> None:
    if _identity(status) != identity:
        raise DataError(f"{path}: was replaced or changed while the run reads it")
