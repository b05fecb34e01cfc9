"""Where messages of the program's own log go."""

import logging
import sys
import warnings


def log_to_stderr() -> None:
    """Write log messages and warnings to stderr, one line each, without the details of libraries."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("absl", "jax", "orbax"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
