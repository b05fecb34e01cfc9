"""Which files a path names: a local file, folder or glob, the same as a URL, or a data set on the Hugging Face hub."""

import difflib
import glob
import json
import logging
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from jaxtrain.data.files.blobs import LocalBlob, RemoteBlob, StoredBlob, data_errors
from jaxtrain.data.files.columnar import ArrowRows, ParquetRows
from jaxtrain.data.files.compressed import SUFFIXES, CompressedBlob
from jaxtrain.data.files.errors import DataError
from jaxtrain.data.files.hub_datasets import HUB, METADATA, hub_files, is_hub
from jaxtrain.data.files.records import ArrayRecordRows
from jaxtrain.data.files.rows import Rows
from jaxtrain.data.files.text import Csv, JsonArray, JsonLines, holds_array
from jaxtrain.hub import download_command, is_hub_name, is_offline
from jaxtrain.remote import RemoteError, filesystem_of, is_missing, is_url

log = logging.getLogger(__name__)

_TEXT = (".jsonl", ".json", ".csv")
_STORED: dict[str, Callable[[StoredBlob, int | None], Rows]] = {
    ".parquet": ParquetRows,
    ".arrow": ArrowRows,
    ".feather": ArrowRows,
    ".array_record": ArrayRecordRows,
}
_ABOUT = ("README", "LICENSE", "CHANGELOG")  # files that are no data
_NAMED = 5  # files in a warning
_SHARD = re.compile(r"-(\d+)-of-(\d+)")
_SAVED = "state.json"  # beside the files that `datasets.save_to_disk` writes
KINDS = (*_TEXT, *(text + packed for text in _TEXT for packed in SUFFIXES), *_STORED)


def find_files(path: str, *, config: str | None = None, split: str | None = None) -> list[str]:
    """The data files of a file name, a folder (all in it) or a glob, local or as a URL, sorted.

    `config` and `split` are those of a data set on the hub. Raises DataError if there is none.
    """
    if is_hub(path):
        return hub_files(path, config, split, lambda name: file_format(name) is not None)
    if config is not None or split is not None:
        raise DataError(f"{path}: `config` and `split` are for data sets on the hub, written {HUB}owner/name")
    if is_url(path):
        return _find_remote(path)
    return _find_local(path.removeprefix("file://"))


def file_format(name: str) -> str | None:
    """Which of `KINDS` a file is by its name. A shard's number may follow: `x.array_record-00000-of-00010`."""
    names = [re.sub(_SHARD.pattern + "$", "", each) for each in (_without_query(name), *_query_values(name))]
    kinds = sorted(KINDS, key=len, reverse=True)
    return next((kind for each in names for kind in kinds if each.endswith(kind)), None)


def holds_rows(name: str) -> bool:
    """Whether a file of a folder or a glob is read: a data file, and none that describes the others."""
    return file_format(name) is not None and name.rpartition("/")[2] not in METADATA


def open_blob(name: str) -> StoredBlob:
    return RemoteBlob(name, *_filesystem(name)) if is_url(name) else LocalBlob(name)


def open_rows(name: str, limit: int | None, files: int) -> Rows:
    """The first `limit` rows of a file, one of `files` that the source has."""
    stored, kind = open_blob(name), file_format(name)
    assert kind is not None, name
    if kind in _STORED:
        return _STORED[kind](stored, limit)

    def content() -> Any:
        return CompressedBlob(stored, kind, files) if kind.endswith(SUFFIXES) else stored

    if kind.startswith(".csv"):
        return Csv(content(), limit)
    is_array = not kind.startswith(".jsonl") and holds_array(content())
    return (JsonArray if is_array else JsonLines)(content(), limit)


def _find_local(path: str) -> list[str]:
    where = Path(path)
    if where.is_file():
        if file_format(path) is None:
            raise DataError(f"{path}: unknown kind of file; known: {', '.join(KINDS)}")
        return [str(where)]
    if where.is_dir():
        files = (file for file in where.rglob("*") if file.is_file())
        # Hidden ones are copies that editors and notebooks leave.
        shown = (file for file in files if not any(part.startswith(".") for part in file.relative_to(where).parts))
        return _data_files(path, sorted(map(str, shown)))
    matched = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
    found = [file for file in matched if holds_rows(file)]
    if not found:
        raise DataError(f"{path}: no such file" + _nearest_file(where) + _hub_hint(path))
    _warn_of_other_files(path, tuple(matched), tuple(found))
    return found


def _find_remote(url: str) -> list[str]:
    filesystem, path = _filesystem(url)
    with data_errors(url):
        if set(_without_query(url)) & set("*?["):
            matched = sorted(filesystem.glob(path))
            found = [file for file in matched if holds_rows(file)]
            if not found:
                _check_reachable(filesystem, re.split(r"[*?\[]", path)[0].rpartition("/")[0] + "/")
            _warn_of_other_files(url, tuple(matched), tuple(found))
        elif file_format(url) is not None:
            found = [path] if _exists(filesystem, path) else []
        else:
            names = sorted(map(filesystem.unstrip_protocol, filesystem.find(path)))
            if not names:
                _check_reachable(filesystem, path)
            return _data_files(url, names)
    if not found:
        raise DataError(f"{url}: no such file")
    return [url] if found == [path] else [filesystem.unstrip_protocol(file) for file in found]


def _without_query(name: str) -> str:
    """Of a URL that ends with `?key=value`; in HTTP whatever follows a question mark, which elsewhere is a glob's."""
    if name.startswith(("http://", "https://")):
        return urlsplit(name).path
    return re.sub(r"\?[\w-]+=.*$", "", name) if is_url(name) else name


def _query_values(name: str) -> list[str]:
    """Of a URL: servers of data sets name the file there, as `https://host/download?file=a.jsonl`."""
    return [value for _, value in parse_qsl(urlsplit(name).query)] if name.startswith(("http://", "https://")) else []


def _exists(filesystem: Any, path: str) -> bool:
    """`exists` of the HTTP file system begins to download the file. Raises what kept the server from being asked."""
    try:
        filesystem.info(path)
    except FileNotFoundError as error:
        if is_missing(error):
            return False
        raise
    return True


def _check_reachable(filesystem: Any, folder: str) -> None:
    """Listing a folder with all below it hides errors, as of a server that cannot be reached: raises them."""
    try:
        filesystem.ls(folder)
    except FileNotFoundError as error:
        if not is_missing(error):
            raise


def _data_files(folder: str, names: list[str]) -> list[str]:
    """The data files among all files of a folder."""
    by_folder: dict[str, list[str]] = {}
    for name in names:
        by_folder.setdefault(name.rpartition("/")[0], []).append(name)
    splits = [within for within, files in by_folder.items() if f"{within}/{_SAVED}" in files]
    if len(splits) > 1 and any(name.endswith("/dataset_dict.json") for name in names):
        raise DataError(
            f"{folder}: `datasets` has saved a DatasetDict there: name the folder of one of its splits, as "
            f"{' or '.join(splits)}"
        )
    found = [name for within, files in by_folder.items() for name in _saved(within, files) if holds_rows(name)]
    if not found:
        raise DataError(f"{folder}: the folder holds no data file ({', '.join(KINDS)})")
    _warn_of_other_files(folder, tuple(names), tuple(found))
    return found


@cache  # once
def _warn_of_other_files(path: str, names: tuple[str, ...], read: tuple[str, ...]) -> None:
    """Warn of files `names` of a folder or a glob that are of another kind than those `read`, and of missing shards."""
    others = [name for name in names if file_format(name) is None]
    others = [name for name in others if Path(name).suffix and not Path(name).name.upper().startswith(_ABOUT)]
    if others:
        more = ", ..." if len(others) > _NAMED else ""
        shown = ", ".join(Path(name).name for name in others[:_NAMED])
        log.warning("%s: %d files of an unknown kind are not read: %s%s", path, len(others), shown, more)
    numbers: dict[tuple[str, int], set[int]] = {}
    for name in read:
        if shard := _SHARD.search(name):
            numbers.setdefault((name[: shard.start()], int(shard[2])), set()).add(int(shard[1]))
    for (name, shards), found in numbers.items():
        if len(found) < shards:
            log.warning("%s: %d of the %d shards of %s are missing", path, shards - len(found), shards, Path(name).name)


def _saved(folder: str, names: list[str]) -> list[str]:
    """The files of a folder that hold its rows: where `datasets.save_to_disk` wrote it, those that its record names.
    The others are the record, and what `map` has cached there."""
    record = f"{folder}/{_SAVED}"
    if record not in names or f"{folder}/dataset_info.json" not in names:
        return names
    blob = open_blob(record)
    try:
        files = json.loads(blob.read(0, blob.size))["_data_files"]
        return [f"{folder}/{each['filename']}" for each in files]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{record}: is not what `datasets.save_to_disk` writes: {error!r}") from None


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        return filesystem_of(url)
    except RemoteError as error:
        raise DataError(str(error)) from None


def _hub_hint(path: str) -> str:
    """How a data set of the hub is named, where a path may be the name of one."""
    if not (is_hub_name(path) or re.fullmatch(r"[\w-]+", path)):
        return ""
    hint = f"; a data set of the hub is written {HUB}{path}"
    if not is_offline() or "/" not in path:
        return hint
    return f"{hint}, and read without a network after `{download_command(path, 'dataset')}`"


def _nearest_file(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if folder != path.parent:
        return f" (the nearest folder that exists is {folder})"
    near = difflib.get_close_matches(path.name, [file.name for file in folder.iterdir()], 1, cutoff=0.4)
    return f"; did you mean {folder / near[0]}?" if near else f" in the folder {folder}"
