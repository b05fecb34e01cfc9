"""The interface of a backend, whose fields are its options."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from jaxtrain.config import ConfigError
from jaxtrain.launch.job import LaunchJob


class Backend(BaseModel, ABC):
    """Starts a job. The fields are named as the engine names them; an unknown one is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    env: dict[str, str] = {}  # variables of the environment of every process

    @abstractmethod
    def render(self, job: LaunchJob) -> str:
        """What `submit` would give to the engine, as text."""

    @abstractmethod
    def submit(self, job: LaunchJob) -> int:
        """Start the job and follow it to its end. Returns its exit code.

        Raises ValueError or OSError if it cannot be started.
        """

    @classmethod
    def from_options(cls, file: Path | None, assignments: Sequence[str] = ()) -> Self:
        """A backend with the options of a YAML file, and those of `assignments`, each `key=value`, which win.

        Values are read as text, so that a time limit of `12:00:00` stays one. Raises ConfigError for a file that cannot
        be read, an unknown option or a wrong value.
        """
        tree = {} if file is None else _mapping(file.read_text(), str(file))
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise ConfigError(f"option {assignment!r} is not of the form key=value")
            tree[key] = _value(text, f"option {key}")
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError("\n".join(cls._fault(fault) for fault in error.errors())) from None

    @classmethod
    def _fault(cls, fault: Any) -> str:
        key = ".".join(map(str, fault["loc"]))
        if fault["type"] != "extra_forbidden":
            return f"option {key}: {fault['msg'].removeprefix('Value error, ')}".replace("option :", "options:")
        near = difflib.get_close_matches(key, cls.model_fields, 1)
        remedy = f"did you mean {near[0]}?" if near else f"known are {', '.join(cls.model_fields)}"
        return f"unknown option {key} of this backend; {remedy}"


def _mapping(text: str, origin: str) -> dict[str, Any]:
    tree = _value(text, origin)
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin} must be a mapping of options")
    return tree


def _value(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {error}") from None
