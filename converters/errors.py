"""What a checkpoint can do wrong, said with the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CheckpointError(ValueError):
    """A Hugging Face folder that cannot be read or written. The message names the file, tensor or key at fault."""


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing where no name is near."""
    near = difflib.get_close_matches(name, list(names), 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""
