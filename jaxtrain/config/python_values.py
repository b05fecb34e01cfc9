"""Values that a program gives a config as Python objects: rows of data, functions and classes.

What is recorded of them is plain: a fingerprint of the rows, an import path of a function or a class.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, PlainSerializer

from jaxtrain.named import FILE, load_named

ROWS_PREFIX = "rows:"  # before the fingerprint of rows, where a config has the path of a file
SOURCE_PREFIX = "source:"  # before the import path of a function that gives rows, likewise


def plain_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """A copy of `rows` with the values that a JSON file would give; arrays become lists.

    Raises ValueError, naming the row, for one that is no mapping or cannot be written as JSON.
    """
    if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence):
        raise ValueError(f"rows must be a list of dicts, not {type(rows).__name__}")
    if not rows:
        raise ValueError("rows is empty: there is nothing to read")
    return tuple(plain_row(row, f"row {number}") for number, row in enumerate(rows, 1))


def plain_row(row: Any, place: str) -> dict[str, Any]:
    """A copy of a row with the values that a JSON file would give. Raises ValueError that names `place`."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} must be a dict, not {type(row).__name__}")
    try:
        return json.loads(json.dumps(dict(row), default=_as_list))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place} cannot be written as JSON: {error}") from None


def source_path(source: str | Callable[..., Any]) -> str:
    """The string recorded as the path of a function that returns rows."""
    return SOURCE_PREFIX + import_path(source)


def rows_path(rows: Sequence[Mapping[str, Any]]) -> str:
    """The string recorded as the path of `rows`: it changes with their content and order."""
    return ROWS_PREFIX + hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def import_path(given: Any) -> Any:
    """`package.module:name` or `file.py:name` of a function or class; anything else is returned as it is."""
    if not callable(given):
        return given
    module = sys.modules.get(given.__module__)
    return f"{getattr(module, FILE, given.__module__)}:{given.__qualname__}"


def _named(given: Any) -> Any:
    if not isinstance(given, str) and not (callable(given) and hasattr(given, "__qualname__")):
        raise ValueError(f"give an import path, or a function or a class, which has a name, not {given!r}")
    return given


Given = Annotated[Any, AfterValidator(_named), PlainSerializer(import_path)]
"""An import path, or the function or class itself."""


def check_importable(given: Any) -> Any:
    """Return an import path, or the function itself, unchanged. Raises ValueError if it names no function."""
    try:
        found = load_named(given, "path")
    except ValueError as error:
        raise ValueError(str(error).removeprefix("path: ")) from None
    if not callable(found):
        raise ValueError(f"{given} is not a function but {type(found).__name__}")
    return given


Importable = Annotated[Given, AfterValidator(check_importable)]
"""As `Given`, imported when the config is checked."""


def _as_list(value: Any) -> Any:
    """Values of numpy, which this module does not import."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__}")
