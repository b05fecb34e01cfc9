"""The cause of an error that orbax has wrapped, and the records of its log."""

import logging
import sys

import pytest

from jaxtrain.train.orbax_errors import is_not_of_orbax, root_cause


def wrapped(cause: BaseException) -> BaseException:
    try:
        raise KeyError("state") from cause
    except KeyError as error:
        return error


def test_the_cause_is_told_in_one_line():
    assert root_cause(wrapped(OSError(28, "No space left on device"))) == "OSError: [Errno 28] No space left on device"
    assert root_cause(ValueError("DATA_LOSS: truncated\n  in file 3")) == "ValueError: DATA_LOSS: truncated"


def test_what_is_no_error_of_a_file_is_raised():
    with pytest.raises(MemoryError):
        root_cause(wrapped(MemoryError()))


def record(level: int, path: str) -> logging.LogRecord:
    return logging.LogRecord("absl", level, path, 1, "a save has failed", None, None)


def test_only_errors_of_orbax_are_filtered():
    orbax = "/lib/orbax/checkpoint/manager.py"
    assert not is_not_of_orbax(record(logging.ERROR, orbax))
    assert is_not_of_orbax(record(logging.WARNING, orbax)) and is_not_of_orbax(record(logging.ERROR, "/lib/grain/a.py"))
    raised = compile("raise OSError", orbax, "exec")
    try:
        exec(raised, {})
    except OSError:
        traced = record(logging.ERROR, "/lib/absl/logging.py")
        traced.exc_info = sys.exc_info()
    assert not is_not_of_orbax(traced)
