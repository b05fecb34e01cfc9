"""Custom objects by the import paths in a config, `package.module:name` or `folder/file.py:name`; similar names."""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

FILE = "_jaxtrain_file"  # in a module that was loaded from a file: the file, as it was named


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the most similar name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def load_named(path: Any, key: str, home: str | None = None) -> Any:
    """The object at the import path `path`, the value of config key `key`. A value that is not a string is returned.

    A bare `name` is looked up in `home`: the module of the built-in ones, or `module:mapping`.
    Raises ValueError that names the key and the nearest name in the module. Exceptions of the module are not caught.
    """
    if not isinstance(path, str):
        return path
    module_name, colon, name = path.rpartition(":")
    if not name or not (module_name if colon else home):
        raise ValueError(f"{key}={path!r} must be of the form package.module:name or file.py:name")
    module = _module(module_name, key) if colon else resolve_name(str(home))
    # A package may import what it names when it is used.
    known = module if isinstance(module, Mapping) else {*vars(module), *getattr(module, "__all__", ())}
    if name not in known:
        hint = did_you_mean(name, [each for each in sorted(known) if each[0] != "_"])
        also = "" if colon else " (a custom one has the form package.module:name or file.py:name)"
        raise ValueError(f"{key}: {module_name or home} has no {name}{hint}{also}")
    return module[name] if isinstance(module, Mapping) else getattr(module, name)


def _module(name: str, key: str) -> ModuleType:
    if name.endswith(".py"):
        return _from_file(Path(name), key)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # another module, which the user's module imports
        raise ValueError(f"{key}: module {name} was not found; is its folder on PYTHONPATH?") from None


def _from_file(file: Path, key: str) -> ModuleType:
    if not file.is_file():
        hint = did_you_mean(file.name, [found.name for found in file.parent.glob("*.py")])
        raise ValueError(f"{key}: file {file} was not found{hint}")
    # Under a unique module name, so that objects of the file can be pickled and another load returns the same ones.
    name = f"_jaxtrain_user_{file.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        vars(module)[FILE] = str(file)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
