"""The heartbeat of a process: a small JSON file in the run's folder, which shows its progress.

Does not import JAX, so that `jaxtrain status` can read it at once.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtrain.observe.run_files import HEARTBEATS

log = logging.getLogger(__name__)

BEAT_SECONDS = 15.0
DEAD_AFTER_SECONDS = 8 * BEAT_SECONDS  # of silence; file systems of several hosts may show a file a minute late


class Heartbeat:
    """Writes the result of `facts` to the process's file every `BEAT_SECONDS`, in a thread, until it is stopped."""

    def __init__(self, run: Path, process: int, processes: int, facts: Callable[[], Mapping[str, Any]]) -> None:
        self._path, self._facts = run / HEARTBEATS / f"process_{process}.json", facts
        self._constant = {
            "process": process,
            "processes": processes,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.time(),
        }
        self._ended = threading.Event()
        self._writing = threading.Lock()
        self._warned = False
        self._path.parent.mkdir(exist_ok=True)
        if process == 0:
            _remove_others(self._path.parent, processes)
        self.beat("running")
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def beat(self, state: str, **further: Any) -> None:
        """Write now. A full disk or a lost file system is only warned of."""
        content = {"time": time.time(), "state": state} | self._constant | dict(self._facts()) | further
        partial = self._path.with_suffix(".tmp")
        try:
            with self._writing:
                partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
                os.replace(partial, self._path)
        except OSError as error:
            if not self._warned:
                log.warning("%s: the heartbeat cannot be written: %s", self._path, error)
            self._warned = True

    def stop(self, state: str, **further: Any) -> None:
        """Write a last time, with the state that the process ends in."""
        self._ended.set()
        self._thread.join()
        self.beat(state, **further)

    def _run(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.beat("running")


def read_heartbeats(run: Path) -> list[dict[str, Any]]:
    """The newest heartbeat of every process of the run in a folder, by process; an unreadable one is left out."""
    found = []
    for path in (run / HEARTBEATS).glob("process_*.json"):
        try:
            beat = json.loads(path.read_text(encoding="utf-8"))
            found.append((int(beat["process"]), beat))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [beat for _, beat in sorted(found, key=lambda pair: pair[0])]


def _remove_others(folder: Path, processes: int) -> None:
    """Remove the files of processes that the run had before and has no more."""
    for path in folder.glob("process_*.json"):
        number = path.stem.removeprefix("process_")
        if number.isdigit() and int(number) >= processes:
            path.unlink(missing_ok=True)
