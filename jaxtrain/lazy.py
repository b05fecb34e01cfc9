"""Lazy imports: a package's names are imported from its modules when they are used (PEP 562)."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(package: str, where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of `package`. `where`: name -> `module:attribute`, or the name of a module."""

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = where[name].partition(":")
        found = import_module(module)
        return getattr(found, attribute) if attribute else found

    def names() -> list[str]:
        return sorted({*where, *vars(import_module(package))})

    return get, names
