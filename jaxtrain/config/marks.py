"""Annotations of config fields besides their type: whether a resumed run may have another value."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MayChange:
    """In a field's `Annotated`: a resumed run may have another value, because the numbers do not depend on it (except
    for rounding). A field without this mark must keep its value; on a section the mark covers all of its fields.

    `when(old, new, config)` restricts the permission; `config` is the RunConfig of the resumed run.
    """

    when: Callable[[Any, Any, Any], bool] = lambda old, new, config: True


@dataclass(frozen=True)
class InputPath:
    """In a field's `Annotated`: the path of files that the run reads. Their content counts, not the path's spelling."""


MAY_CHANGE = MayChange()
INPUT_PATH = InputPath()
