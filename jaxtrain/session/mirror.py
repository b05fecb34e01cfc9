"""The folder of a run whose `run.dir` is a URL: a local copy in which the run works, and which it uploads.

Orbax writes checkpoints at gs:// itself, from all hosts together. Elsewhere they are files of the copy like the others,
which only a run of one process can upload whole.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import posixpath
import shutil
import tempfile
from pathlib import Path

from jaxtrain.observe.run_files import CONFIG, HEARTBEATS
from jaxtrain.remote import RemoteError, cache_home, filesystem_of, is_url, remote_errors
from jaxtrain.session.lock import LOCK
from jaxtrain.session.record import CHECKPOINTS, ORIGIN, writes_checkpoints

_Version = tuple[int, int]  # size and time of a file


class RunMirror:
    """A copy of the files at `url` in the folder `path`, by default one in `cache_home()`. Each process has its own."""

    def __init__(self, url: str, process: int = 0, processes: int = 1, path: Path | None = None) -> None:
        """Raises RemoteError where several processes cannot write checkpoints to `url`."""
        self._url, self._direct = url.rstrip("/"), writes_checkpoints(url)
        if processes > 1 and not self._direct:
            raise RemoteError(
                f"run.dir={url}: several processes write checkpoints to a folder that they share, or to gs://: mount "
                "the bucket on all hosts, and name the mounted folder"
            )
        digest = hashlib.sha256(self._url.encode()).hexdigest()[:16]
        part = f".{process}-of-{processes}" if processes > 1 else ""
        self.path = path or cache_home() / "runs" / f"{digest}{part}-{posixpath.basename(self._url)}"
        self._uploaded: dict[str, _Version] = {}

    def pull(self, *, checkpoints: bool = True) -> None:
        """Replace the copy by what is at the URL. Raises RemoteError.

        Without `checkpoints` these are folders of their steps and times, with nothing in them.
        """
        filesystem, root = filesystem_of(self._url)
        self.path.mkdir(parents=True, exist_ok=True)
        for each in self.path.iterdir():
            if each.name != LOCK:
                shutil.rmtree(each) if each.is_dir() else each.unlink()
        (self.path / ORIGIN).write_text(self._url)
        with remote_errors(self._url):
            filesystem.invalidate_cache()
            found = filesystem.find(root) if filesystem.exists(root) else []
            for name in (posixpath.relpath(file, root) for file in found):
                if not checkpoints and name.startswith(f"{CHECKPOINTS}/"):
                    step = self.path / CHECKPOINTS / name.split("/")[1]
                    written = filesystem.modified(f"{root}/{name}").timestamp()
                    if not step.exists():
                        step.mkdir(parents=True)
                    elif written <= step.stat().st_mtime:
                        continue
                    os.utime(step, (written, written))
                elif self._is_mirrored(name):
                    (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                    filesystem.get_file(f"{root}/{name}", str(self.path / name))
        self._uploaded = self._files()

    def push(self) -> None:
        """Upload what this process has changed since, and remove what it has removed. Raises RemoteError."""
        filesystem, root = filesystem_of(self._url)
        files = self._files()
        with remote_errors(self._url, "written"):
            for name, version in files.items():
                if self._uploaded.get(name) != version:
                    filesystem.makedirs(posixpath.dirname(f"{root}/{name}"), exist_ok=True)
                    filesystem.put_file(str(self.path / name), f"{root}/{name}")
                    self._uploaded[name] = version
            for name in self._uploaded.keys() - files.keys():  # last: an interrupted upload must not lose the old ones
                filesystem.rm_file(f"{root}/{name}")
                del self._uploaded[name]

    def _files(self) -> dict[str, _Version]:
        paths = {path.relative_to(self.path).as_posix(): path for path in sorted(self.path.rglob("*"))}
        stats = {name: path.stat() for name, path in paths.items() if path.is_file() and self._is_mirrored(name)}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    def _is_mirrored(self, name: str) -> bool:
        if name.startswith(f"{HEARTBEATS}/"):  # rewritten meanwhile by their thread
            return False
        return name not in (LOCK, ORIGIN) and not (self._direct and name.startswith(f"{CHECKPOINTS}/"))


def local_run(run: str | Path, *, checkpoints: bool = True) -> Path:
    """The folder of a run to read: `run`, or where that is a URL a copy until this process ends. Raises RemoteError.

    `checkpoints`: whether what they hold is needed.
    """
    if not is_url(str(run)):
        return Path(str(run).removeprefix("file://"))
    copy = Path(tempfile.mkdtemp(prefix="jaxtrain-run-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    mirror = RunMirror(str(run), path=copy / posixpath.basename(str(run).rstrip("/")))
    mirror.pull(checkpoints=checkpoints)
    if not (mirror.path / CONFIG).is_file():
        raise RemoteError(f"{run}: is not the folder of a run: it has no {CONFIG}")
    return mirror.path


def push_file(path: Path, run: str) -> str:
    """Write a file into the folder of a run at the URL `run`. Returns its URL. Raises RemoteError."""
    filesystem, root = filesystem_of(run)
    with remote_errors(run, "written"):
        filesystem.put_file(str(path), f"{root}/{path.name}")
    return f"{run.rstrip('/')}/{path.name}"
