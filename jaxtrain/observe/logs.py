"""Where the messages of a program go: to stderr, and of a run also to a file in its folder."""

from __future__ import annotations

import logging
import shlex
import sys
import traceback
import warnings
from collections.abc import Mapping
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Self, TextIO

from jaxtrain.observe.run_files import LOGS

_PRINTED = logging.getLogger("jaxtrain.printed")  # what a run prints: only its log file records it
_MAX_EARLY = 10_000  # messages before a run begins
_NEVER = logging.CRITICAL + 1


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at the moment, which a progress bar replaces to stay below all messages."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sys.stderr


def log_to_stderr() -> None:
    """Write log messages and warnings to stderr, one line each, without the details of libraries.

    Where stderr is no terminal each line begins with the time.
    """
    form = "%(message)s" if sys.stderr.isatty() else "%(asctime)s %(message)s"
    handler = _Stderr()
    handler.setFormatter(logging.Formatter(form, "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for chatty in ("absl", "jax", "orbax"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *_: f"warning: {message}"
    logging.captureWarnings(True)


class RunLog:
    """Context manager of a run: its messages, printed lines and its error, in a file of the run's folder.

    The file is opened by `begin`, since a refused start leaves the folder as it was; earlier messages are kept for it.
    """

    def __init__(self) -> None:
        self._early = MemoryHandler(_MAX_EARLY, flushLevel=_NEVER, flushOnClose=False)
        self._file: logging.FileHandler | None = None

    def __enter__(self) -> Self:
        self._attach(self._early)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and self._file is not None:
            self.line("the run ended with an error\n" + "".join(traceback.format_exception(error)).rstrip())
        for handler in (self._early, self._file):
            if handler is not None:
                logging.getLogger().removeHandler(handler)
                _PRINTED.removeHandler(handler)
                handler.close()

    def begin(self, run: Path, process: int, about: Mapping[str, Mapping[str, Any]]) -> None:
        """Append to `logs/process_N.log`, first the command and what is known `about` the place, by section."""
        path = run / LOGS / f"process_{process}.log"
        path.parent.mkdir(exist_ok=True)
        self._file = logging.FileHandler(path, encoding="utf-8", delay=True)
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger().removeHandler(self._early)
        _PRINTED.removeHandler(self._early)
        self._attach(self._file)
        facts = [f"{title}.{name}: {value}" for title, values in about.items() for name, value in values.items()]
        self.line("\n  ".join([f"command: {shlex.join(sys.argv)}", *facts]))
        self._early.setTarget(self._file)
        self._early.flush()

    def line(self, text: str) -> None:
        """Record what is printed."""
        _PRINTED.info("%s", text)

    def _attach(self, handler: logging.Handler) -> None:
        logging.getLogger().addHandler(handler)
        _PRINTED.setLevel(logging.INFO)
        _PRINTED.propagate = False
        _PRINTED.addHandler(handler)
