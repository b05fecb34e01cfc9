"""Folders at URLs that fsspec knows: read by copying their files into a local cache, written by an upload at the end.

Data is not copied: `jaxtrain.data.files` reads ranges of remote files.
"""

import fnmatch
import hashlib
import json
import os
import posixpath
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

_DRIVERS = {  # the package that reads a protocol
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
}
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "VersionId", "blob_id", "lfs")
_TIMES = ("LastModified", "last_modified", "updated", "created", "mtime")
_RECORD = ".remote.json"  # in a copy: which version of each file it has


class RemoteError(ValueError):
    """A URL that cannot be read or written."""


def is_url(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/jaxtrain`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxtrain"


def filesystem_of(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, which finds the credentials itself, and the path in it. Raises RemoteError."""
    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _DRIVERS.get(protocol)
        install = f"pip install {package}" if package else str(error)
        raise RemoteError(f"{url}: reading {protocol}:// needs a package that is not installed: {install}") from None
    except ValueError as error:
        raise RemoteError(f"{url}: {error}") from None


def version(info: Mapping[str, Any], *, times: bool = False) -> dict[str, str]:
    """The version of a file from the server's description; with `times`, also of when it was written."""
    marks = (*_VERSIONS, *_TIMES) if times else _VERSIONS
    return {mark: str(info[mark]) for mark in marks if info.get(mark)}


@contextmanager
def remote_errors(url: str, what: str = "read") -> Iterator[None]:
    """Whatever a remote file system raises becomes a RemoteError that names the URL."""
    try:
        yield
    except RemoteError:
        raise
    except Exception as error:  # each driver raises errors of its own client's, which have no common base
        if isinstance(error, FileNotFoundError) and not is_missing(error):
            error = error.__cause__ or error  # what happened, which the HTTP file system calls a missing file
        detail = str(error).strip().splitlines() or [""]
        if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror, *_connection_errors())):
            what = "reached"
        reason = f"{url}: cannot be {what}: {type(error).__name__}: {detail[0]}"
        raise RemoteError(reason + _hub_hint(url)) from error


def is_missing(error: FileNotFoundError) -> bool:
    """Whether a file is not there. The HTTP file system says so too where it could not ask: the cause is then another
    error.
    """
    cause = error.__cause__
    return cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410)


def _connection_errors() -> tuple[type[Exception], ...]:
    """Of the clients of fsspec's drivers that are in use."""
    names = {"aiohttp": "ClientConnectionError", "botocore.exceptions": "EndpointConnectionError"}
    return tuple(getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules)


def _hub_hint(url: str) -> str:
    """How files of the hub are read without a network, where `url` is one of its."""
    found = re.match(r"hf://(datasets/)?([^/]+/[^/@]+)", url)
    if found is None:
        return ""
    kind, name = (" --repo-type dataset" if found[1] else ""), found[2]
    named = f"hf:{name}" if found[1] else name
    return f". Without a network, give it as {named} after `hf download {name}{kind}`"


def copied_folder(url: str, patterns: Sequence[str]) -> Path:
    """A local copy of the files directly in the folder `url` whose names match `patterns`, in `cache_home()`.

    Files that have not changed since an earlier call are not copied again. Raises RemoteError, also where no file
    matches.
    """
    filesystem, path = filesystem_of(url)
    folder = cache_home() / "remote" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{posixpath.basename(path)}"
    record = folder / _RECORD
    known = json.loads(record.read_text()) if record.is_file() else {}
    with remote_errors(url):
        listed = {posixpath.basename(info["name"]): info for info in filesystem.ls(path, detail=True)}
        found = {
            name: info
            for name, info in listed.items()
            if info["type"] == "file" and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        }
        if not found:
            raise RemoteError(f"{url}: the folder does not exist, or holds none of {', '.join(patterns)}")
        folder.mkdir(parents=True, exist_ok=True)
        for name, info in found.items():
            now = {"size": info["size"], **version(info, times=True)}
            if len(now) > 1 and now == known.get(name) and (folder / name).is_file():
                continue
            partial = folder / f".{name}.{os.getpid()}"
            filesystem.get_file(info["name"], str(partial))
            partial.replace(folder / name)
            known[name] = now
    for name in known.keys() - listed.keys():
        (folder / name).unlink(missing_ok=True)
    kept = {name: version for name, version in known.items() if name in listed}
    partial = folder / f"{_RECORD}.{os.getpid()}"
    partial.write_text(json.dumps(kept))
    partial.replace(record)
    return folder


@contextmanager
def written_folder(out: str | Path) -> Iterator[Path]:
    """A local folder to write: `out` itself, or where that is a URL a temporary one that is uploaded at the end.

    Raises RemoteError where the URL holds files or cannot be written.
    """
    url = str(out)
    if not is_url(url):
        yield Path(url.removeprefix("file://"))
        return
    filesystem, path = filesystem_of(url)
    with remote_errors(url):
        if filesystem.exists(path) and filesystem.find(path):
            raise RemoteError(f"{url} is not empty: choose another place")
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "out"
        files = [file for file in sorted(Path(folder, "out").rglob("*")) if file.is_file()]
        with remote_errors(url, "written"):
            for file in files:
                target = f"{path.rstrip('/')}/{file.relative_to(Path(folder, 'out')).as_posix()}"
                filesystem.makedirs(posixpath.dirname(target), exist_ok=True)
                filesystem.put_file(str(file), target)
