"""Annotations of config fields besides their type: whether a resumed run may have another value."""

import os.path
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import AfterValidator


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


def in_home(path: str) -> str:
    """The path, where `~/` at its start is the user's home folder: a shell does not replace it after `key=`."""
    return os.path.expanduser(path) if path.startswith("~/") else path


MAY_CHANGE = MayChange()
INPUT_PATH = InputPath()
IN_HOME = AfterValidator(lambda path: None if path is None else in_home(path))
