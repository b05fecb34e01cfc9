"""Fingerprints of the files that a run reads, so that files changed since it began are noticed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from jaxtrain.config import RunConfig
from jaxtrain.config.changes import input_paths
from jaxtrain.data.sources import DataError, find_files

Fingerprint = dict[str, str]  # file name within the path -> hash; the name of a single file is ""

_MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")
_BLOCKS, _BLOCK_BYTES = 16, 1 << 16


def fingerprints(config: RunConfig) -> dict[str, Fingerprint]:
    """Of every input path of the config, by its key. Empty for a path without files, which whoever reads it reports.

    Large files are sampled: size and 16 blocks, so a change inside that keeps the size may go unnoticed. Times and the
    location do not count: a copy has the same fingerprint.
    """
    return {key: fingerprint_path(key, path) for key, path in input_paths(config)}


def changed_file(old: Fingerprint, new: Fingerprint) -> str | None:
    """The first file that was changed, added or removed, and how; None if there is none."""
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            happened = "is new" if name not in old else "is gone" if name not in new else "has other content"
            return f"{name} {happened}" if name else f"it {happened}"
    return None


def fingerprint_path(key: str, path: str) -> Fingerprint:
    """Of the files that `path` under the config key `key` stands for."""
    if os.path.isfile(path):
        return {"": _hash(Path(path))}
    if key.startswith("data."):
        try:
            files = find_files(path)
        except DataError:
            return {}
        root = Path(path) if os.path.isdir(path) else Path(os.path.commonpath([file.parent for file in files]))
        return {file.relative_to(root).as_posix(): _hash(file) for file in files}
    files = sorted(Path(path).glob("*")) if os.path.isdir(path) else []
    return {file.name: _hash(file) for file in files if file.suffix in _MODEL_FILES and file.is_file()}


def _hash(path: Path) -> str:
    """Of a file's size and content, or of blocks spread evenly over a large one, its ends included."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        if size <= _BLOCKS * _BLOCK_BYTES:
            digest.update(file.read())
        else:
            for block in range(_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]
