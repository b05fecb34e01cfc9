"""The errors of orbax: their causes, and its own reports of them."""

import logging
import traceback

# Raised when a damaged folder is read or a disk is full: orbax, tensorstore and json use builtin exceptions.
IO_ERRORS = (OSError, ValueError, KeyError, TypeError)


def root_cause(error: BaseException) -> str:
    """The root cause of an error, in one line. Raises the cause if it is not an I/O error.

    Orbax wraps all exceptions of a read, also MemoryError and KeyboardInterrupt, in a KeyError.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    if not isinstance(error, IO_ERRORS):
        raise error
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:300]}"


def is_not_of_orbax(record: logging.LogRecord) -> bool:
    """A filter of log records."""
    # The threads of a failed save each log a traceback, hundreds of lines in total, besides the error that is raised.
    if record.levelno < logging.ERROR:
        return True
    # absl names the place of the call only if it made the logger "absl" itself, before anything else asked for it.
    trace = record.exc_info[2] if record.exc_info else None
    places = [record.pathname, *(frame.filename for frame in traceback.extract_tb(trace))]
    return not any("/orbax/" in place for place in places)


def still_runs(error: Exception) -> bool:
    """Whether the error of a response means that the save is not done. The TimeoutErrors of orbax's barriers have a
    text."""
    return isinstance(error, TimeoutError) and not error.args
