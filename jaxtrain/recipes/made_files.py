"""Tracks the files that the quickstart made, so that it replaces only those.

Each folder with such files has a `.made-by-quickstart`, which lists their names with a hash of each file: a file that
has changed belongs to the user. In a run's folder it holds the process that made the run and, once that has ended, all
files below the folder; any other run there removes it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtrain.observe.run_files import LOCK, RUN_FILES
from jaxtrain.observe.run_files import QUICKSTART_MARK as MARK
from jaxtrain.session.lock import FolderLock
from jaxtrain.session.record import write_atomically

EXPORT = "export"  # in a run's folder


def find_conflicts(folder: Path, names: Sequence[str] | None = None) -> list[str]:
    """The files in a folder (those of `names`, or all) that the quickstart did not make, each with the reason."""
    if not folder.is_dir():
        return [f"{folder}: not a folder"] if _exists(folder) else []
    if names is None and not (folder / MARK).is_file():
        return [f"{folder}: not made by the quickstart"] if any(folder.iterdir()) else []
    made = _made(folder)
    found = []
    for path in (folder / name for name in names) if names is not None else sorted(folder.iterdir()):
        if not _exists(path) or path.name == MARK:
            continue
        if path.name not in made:
            found.append(f"{path}: not made by the quickstart")
        elif path.is_symlink() or made[path.name] not in (None, _hash(path)):
            found.append(f"{path}: changed since the quickstart made it")
    return found


@contextmanager
def replacing_files(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """A context in which the files `names` of a folder are made. Those of an earlier quickstart are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    made = _made(folder)
    # First without hashes: if this process is killed, an incomplete file still counts as the quickstart's.
    _record(folder, made | dict.fromkeys(names))
    yield
    others = {name: hash for name, hash in made.items() if name not in names}
    _record(folder, others | {name: _hash(folder / name) for name in names if (folder / name).exists()})


def find_run_conflicts(folder: Path) -> list[str]:
    """The files in a run's folder that no earlier run of the quickstart made, each with the reason."""
    if not (folder / MARK).is_file():
        return find_conflicts(folder)
    made = json.loads((folder / MARK).read_text()).get("files")
    if made is None:  # the quickstart was killed: all files of a run are its own
        own = {MARK, LOCK, EXPORT, *RUN_FILES}
        return [f"{path}: not made by the quickstart" for path in sorted(folder.iterdir()) if path.name not in own]
    found = []
    for name in _files_below(folder):
        if name not in made:
            found.append(f"{folder / name}: not made by the quickstart")
        elif (folder / name).is_symlink() or made[name] != _hash(folder / name):
            found.append(f"{folder / name}: changed since the quickstart made it")
    return found


@contextmanager
def replacing_run(folder: Path) -> Iterator[None]:
    """A context in which a run is made in its folder. An earlier run of the quickstart is removed."""
    with FolderLock(folder) as lock:
        lock.keep()
        for name in (EXPORT, *RUN_FILES):
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        _record(folder, {"process": os.getpid()})
    try:
        yield
    finally:
        _record(
            folder, {"process": os.getpid(), "files": {name: _hash(folder / name) for name in _files_below(folder)}}
        )


def _files_below(folder: Path) -> list[str]:
    """Relative paths of all files and links below `folder`, without the mark and the lock."""
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return [path.relative_to(folder).as_posix() for path in paths if path not in (folder / MARK, folder / LOCK)]


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _made(folder: Path) -> dict[str, str | None]:
    return json.loads((folder / MARK).read_text()) if (folder / MARK).is_file() else {}


def _record(folder: Path, made: Mapping[str, Any]) -> None:
    write_atomically(folder / MARK, json.dumps(made, indent=1) + "\n")


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
