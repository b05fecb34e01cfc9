"""The log of a command."""

import logging
import re
import subprocess
import sys

import pytest

from jaxtrain.observe.logs import RunLog

CODE = """
import logging, warnings
from jaxtrain.observe.logs import log_to_stderr
log_to_stderr()
logging.getLogger("jaxtrain.session").info("one of ours")
logging.getLogger("orbax.checkpoint").info("a detail")
logging.getLogger("absl").warning("a library's warning")
warnings.warn("look at this")
"""


def test_messages_are_lines_without_the_details_of_libraries():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = [re.fullmatch(r"\d\d:\d\d:\d\d (.*)", line) for line in done.stderr.splitlines()]
    assert [line and line[1] for line in lines] == ["one of ours", "a library's warning", "warning: look at this"]


def test_the_file_of_a_run_has_what_was_said_before_it_began_and_its_error(tmp_path):
    ours = logging.getLogger("jaxtrain.test")
    with pytest.raises(ValueError, match="at last"), RunLog() as log:
        ours.warning("early")
        assert not list(tmp_path.iterdir())
        log.begin(tmp_path, 3, {"packages": {"jax": "1.2.3"}})
        log.line("printed")
        raise ValueError("at last")
    ours.warning("after the run")
    log.line("after the run")
    text = (tmp_path / "logs" / "process_3.log").read_text()
    places = [
        text.index(part) for part in ("command: ", "packages.jax: 1.2.3", "early", "printed", "ValueError: at last")
    ]
    assert places == sorted(places) and "after the run" not in text


def test_a_refused_start_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="no"), RunLog():
        raise ValueError("no")
    assert not list(tmp_path.iterdir())
