"""Errors of checkpoints, and suggestions of similar names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CheckpointError(ValueError):
    """A Hugging Face folder that cannot be read or written. The message names the file, tensor or key."""


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean ...?` with the most similar name, or an empty string."""
    near = difflib.get_close_matches(name, list(names), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""
