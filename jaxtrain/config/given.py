"""Values that a program gives a config as Python objects: rows of data, functions and classes.

What is recorded of them is plain: a fingerprint of the rows, an import path of a function or a class.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, PlainSerializer

ROWS = "rows:"  # before the fingerprint of rows, where a config has the path of a file


def plain_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """A copy of `rows` with the values that a JSON file would give; arrays become lists.

    Raises ValueError, naming the row, for one that is no mapping or cannot be written as JSON.
    """
    if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence):
        raise ValueError(f"rows must be a list of dicts, not {type(rows).__name__}")
    if not rows:
        raise ValueError("rows is empty: there is nothing to read")
    plain = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {number} must be a dict, not {type(row).__name__}")
        try:
            plain.append(json.loads(json.dumps(dict(row), default=_as_list)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {number} cannot be written as JSON: {error}") from None
    return tuple(plain)


def rows_path(rows: Sequence[Mapping[str, Any]]) -> str:
    """What stands for `rows` where a config has a path: it changes with their content and order."""
    return ROWS + hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def import_path(given: Any) -> Any:
    """`package.module:name` of a function or class; anything else is returned as it is."""
    return f"{given.__module__}:{given.__qualname__}" if callable(given) else given


def _named(given: Any) -> Any:
    if callable(given) and not hasattr(given, "__qualname__"):
        raise ValueError(f"give a function or a class, which has a name, not {given!r}")
    return given


Given = Annotated[str | Callable[..., Any], AfterValidator(_named), PlainSerializer(import_path)]
"""An import path, or the function or class itself."""


def _as_list(value: Any) -> Any:
    """Values of numpy, which this module does not import."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__}")
