"""Lazy imports: a package's names are imported from its modules when they are used (PEP 562)."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of `package`. `where`: name -> `module:attribute`, or the name of a module."""

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = where[name].partition(":")
        found = import_module(module)
        return getattr(found, attribute) if attribute else found

    return get
