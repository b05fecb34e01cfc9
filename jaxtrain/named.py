"""Objects of the user's, named in a config: `package.module:name` or `folder/file.py:name`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load_named(path: Any, key: str, home: str | None = None) -> Any:
    """The object that `path` names; `key` is the config key that it stands under. What is no string is the object.

    A bare `name` is looked up in the module `home`, where the ready ones are.
    Raises ValueError that names the key and the module or the nearest name in it. What the module raises, it raises.
    """
    if not isinstance(path, str):
        return path
    module_name, colon, name = path.rpartition(":")
    if not name or not (module_name if colon else home):
        raise ValueError(f"{key}={path!r} must be of the form package.module:name or file.py:name")
    module = _module(module_name, key) if colon else importlib.import_module(str(home))
    if name not in vars(module):
        near = difflib.get_close_matches(name, [known for known in vars(module) if known[0] != "_"], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        also = "" if colon else "; one of your own is named package.module:name or file.py:name"
        raise ValueError(f"{key}: {module_name or home} has no {name}{hint}{also}")
    return vars(module)[name]


def _module(name: str, key: str) -> ModuleType:
    if name.endswith(".py"):
        return _from_file(Path(name), key)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a module that the user's module needs
        raise ValueError(f"{key}: there is no module {name}; is its folder on PYTHONPATH?") from None


def _from_file(file: Path, key: str) -> ModuleType:
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [found.name for found in file.parent.glob("*.py")], 1)
        raise ValueError(f"{key}: there is no file {file}" + (f"; did you mean {near[0]}?" if near else ""))
    # Under a name of its own, so that objects of the file can be pickled and a second load gives the same ones.
    name = f"_jaxtrain_user_{file.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
