"""Functions of the user's own, named in a config by `package.module:name`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any


def import_by_path(path: str, key: str) -> Callable[..., Any]:
    """The function at `package.module:name`; `key` is the config key that names it.

    Raises ValueError, naming the key, where there is no such module or function.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"{key}={path!r} must be of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # a module that the user's module needs
        raise ValueError(f"{key}: there is no module {module_name}; is its folder on PYTHONPATH?") from None
    found = vars(module).get(name)
    if not callable(found):
        near = difflib.get_close_matches(name, [n for n, value in vars(module).items() if callable(value)], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{key}: {module_name} has no function {name}{hint}")
    return found
