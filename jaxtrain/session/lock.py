"""The lock of a run's folder: only one process at a time uses it."""

import errno
import fcntl
import json
import os
import socket
import uuid
import warnings
from pathlib import Path
from typing import Self

from jaxtrain.observe.run_files import LOCK

# What flock raises on file systems that have no locks.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


class FolderInUseError(ValueError):
    """Another process uses the folder. The message names the process and its host."""


class FolderLock:
    """An flock on `.lock` in a folder, which is created if missing. The system releases it when the process ends.

    While it is held, the file names the holder. Unless `keep` was called, `release` restores the previous state: the
    old content of the file, and no folder if there was none.
    """

    def __init__(self, folder: Path) -> None:
        """Raises FolderInUseError if another process, or another lock of this process, holds the folder."""
        self._made = _make_missing(folder)
        self._path = folder / LOCK
        self._kept = False
        self._file, self._existed = self._acquire(folder)
        self._before = os.pread(self._file, os.fstat(self._file).st_size, 0)
        self.nonce = uuid.uuid4().hex
        """The file's content while the lock is held: whoever reads it there sees the same folder."""
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "nonce": self.nonce}
        _rewrite(self._file, json.dumps(holder).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def keep(self) -> None:
        """Keep the folder and the lock file on release, because the folder is going to be written to."""
        self._kept = True

    def release(self) -> None:
        if self._kept:
            _rewrite(self._file, b"")
        elif self._existed:
            _rewrite(self._file, self._before)
        else:
            self._path.unlink()
        os.close(self._file)
        if not self._kept:
            _remove_empty(self._made)

    def _acquire(self, folder: Path) -> tuple[int, bool]:
        """The locked file, and whether it existed before."""
        while True:
            existed = self._path.exists()
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(os.pread(file, os.fstat(file).st_size, 0))
                os.close(file)
                raise FolderInUseError(
                    f"{folder} is in use by {holder}: wait until it ends, stop it, or choose another run.dir"
                ) from None
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    os.close(file)
                    raise
                warnings.warn(
                    f"{folder}: the file system has no locks ({error.strerror}); do not start a second run in it",
                    RuntimeWarning,
                    stacklevel=4,
                )
            if _is_same_file(file, self._path):
                return file, existed
            os.close(file)  # its holder removed it after we opened it


def sees_nonce(folder: Path, nonce: str) -> bool:
    """Whether this host sees the lock file of the process that holds `folder`."""
    try:
        return json.loads((folder / LOCK).read_bytes())["nonce"] == nonce
    except (OSError, ValueError, KeyError, TypeError):  # none there, or not written yet
        return False


def _holder(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on host {holder['host']}"
    except (ValueError, KeyError, TypeError):  # not written yet
        return "another process"


def _is_same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _rewrite(file: int, content: bytes) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, content, 0)


def _make_missing(folder: Path) -> list[Path]:
    """Create the folder and its missing parents; return those that were created, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if any(folder.iterdir()):
            return
        folder.rmdir()
