"""The log of a command."""

import subprocess
import sys

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
    assert done.stderr == "one of ours\na library's warning\nwarning: look at this\n"
