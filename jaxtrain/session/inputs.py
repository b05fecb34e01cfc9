"""Fingerprints of the files that a run reads, which reveal files that changed since it started."""

import os
from pathlib import Path

from jaxtrain.config import RunConfig
from jaxtrain.config.changes import input_paths
from jaxtrain.data.files.errors import DataError
from jaxtrain.data.files.find import find_files, open_blob
from jaxtrain.data.files.hub_datasets import is_hub
from jaxtrain.hub import local_folder

Fingerprint = dict[str, str]  # file name within the path -> hash; the name of a single file is ""

_MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")


def input_fingerprints(config: RunConfig) -> dict[str, Fingerprint]:
    """Fingerprints of all input paths of the config, by key. Empty for a path without files (reading it is an error).

    Of large files only the size and 16 blocks are hashed, so a change that keeps the size may go unnoticed. Timestamps
    and locations are not included: a copy has the same fingerprint.
    """
    return {key: fingerprint_path(key, path) for key, path in input_paths(config)}


def changed_file(old: Fingerprint, new: Fingerprint) -> str | None:
    """A message about the first file that was changed, added or removed; None if all are equal."""
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            happened = "is new" if name not in old else "is missing" if name not in new else "has other content"
            return f"{name} {happened}" if name else f"it {happened}"
    return None


def fingerprint_path(key: str, path: str) -> Fingerprint:
    """The fingerprint of the files at `path`, the value of the config key `key`.

    Empty for a data set on the hub, whose commit is in the data's state.
    """
    if os.path.isfile(path):
        return {"": _digest(path)}
    if key.startswith("data."):
        try:
            files = [] if is_hub(path) else find_files(path)
        except DataError:
            return {}
        if not files:
            return {}
        root = path if os.path.isdir(path) else os.path.commonpath([os.path.dirname(file) for file in files])
        return {os.path.relpath(file, root): _digest(file) for file in files}
    folder = Path(path) if key.endswith("chat_template") else local_folder(path, weights=key.endswith(".path"))
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    return {file.name: _digest(str(file)) for file in files if file.suffix in _MODEL_FILES and file.is_file()}


def _digest(name: str) -> str:
    """Of a file's size and content, or of blocks spread evenly over a large one, its ends included."""
    blob = open_blob(name)
    return f"{blob.size}-{blob.digest()}"
