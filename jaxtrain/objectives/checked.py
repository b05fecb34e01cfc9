"""`Checked`: a dataclass whose values are checked by its annotations when it is made, in Python as in a config."""

from dataclasses import fields
from functools import cache
from typing import Any, cast, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic reads that of `typing` from Python 3.12 on


class Checked:
    """The base of dataclasses of numbers: types and bounds are in the annotations of their fields alone.

    Raises ValueError, which names the class, the field and its value. A subclass with a `__post_init__` of its own
    calls `super().__post_init__()` first.
    """

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}
        try:
            _adapter(type(self)).validate_python(values, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"] if str(part) in values)
            raise ValueError(f"{type(self).__name__}: {where}={values[where]!r}: {first['msg']}") from None


@cache
def _adapter(kind: type) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    section = cast(Any, TypedDict)(kind.__name__, {field.name: hints[field.name] for field in fields(cast(Any, kind))})
    section.__pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)
    return TypeAdapter(section)
