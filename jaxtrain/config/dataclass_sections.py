"""Sections whose keys are the fields of a dataclass: `objective`, `rl.algorithm` and `sampling`.

Types, bounds, defaults and checks are defined by the dataclass alone, which is imported when a config is checked.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from pkgutil import resolve_name
from typing import Annotated, Any, Required, cast, get_type_hints

from pydantic import BeforeValidator, ConfigDict, TypeAdapter
from pydantic_core import PydanticCustomError, to_json
from typing_extensions import TypedDict  # pydantic reads that of `typing` from Python 3.12 on

from jaxtrain.config.python_values import import_path
from jaxtrain.named import load_named


@dataclass(frozen=True, eq=False)
class FieldsOf:
    """In a field's `Annotated`: its keys are the fields of the dataclass that `path` names.

    `set_elsewhere`: the fields that are no keys, and the error for a user who sets one.
    `only_of`: the class whose subclasses `set_elsewhere` is about; default: all.
    `has_name`: whether the section has a key `name` besides, which selects the dataclass.
    """

    path: str
    set_elsewhere: Mapping[str, str]
    has_name: bool = False
    only_of: str | None = None

    @property
    def kind(self) -> type:
        """The dataclass."""
        return resolve_name(self.path)

    def hints(self) -> dict[str, Any]:
        """The keys, with their types."""
        kind = self.kind
        hints = {"name": str} | get_type_hints(kind, include_extras=True)
        return {key: hints[key] for key in self._known(kind)}

    def section(self, value: Any) -> dict[str, Any]:
        """The keys of a dataclass with their values: what a config records of it."""
        name = {"name": _shown(type(value))} if self.has_name else {}
        return name | {field.name: getattr(value, field.name) for field in self._fields(value)}

    def apply(self, base: Any, given: Mapping[str, Any]) -> Any:
        """The dataclass `base` with the values of `given` in its fields, or an instance of the class `base` with them.

        Values are checked as those of a JSON file, strictly: a list is accepted as a tuple, a mapping as a dataclass.
        Raises ValidationError, which names all wrong keys. Raises ValueError for a value that is not the default and
        changes nothing, by the dataclass's `without_effect` (field -> why), and what the dataclass itself raises.
        """
        if not isinstance(given, Mapping):
            raise ValueError("should be a mapping of keys to values")
        given = {str(name): value for name, value in given.items()}
        kind: Any = base if isinstance(base, type) else type(base)
        hints = get_type_hints(kind, include_extras=True)
        keys: dict[str, Any] = {}
        for field in self._fields(kind):
            needed = base is kind and field.default is MISSING and field.default_factory is MISSING
            keys[field.name] = Required[hints[field.name]] if needed else hints[field.name]
        unknown = PydanticCustomError("unknown_field", "unknown key", {"known": self._known(kind)})
        elsewhere = self._set_elsewhere(kind)
        for name in [name for name in given if name not in keys]:
            error = PydanticCustomError("set_elsewhere", "{why}", {"why": elsewhere.get(name, "")})
            keys[name] = _refused(error if name in elsewhere else unknown)
        section = cast(Any, TypedDict)(kind.__name__, keys, total=False)
        section.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
        values = TypeAdapter(section).validate_json(to_json(given, fallback=repr))
        made = kind(**values) if base is kind else replace(cast(Any, base), **values)
        for name, reason in getattr(made, "without_effect", {}).items():
            if name in values and values[name] != getattr(base, name, None):
                raise ValueError(f"{name}={given[name]} has no effect: {reason}; leave it out")
        return made

    def _fields(self, kind: Any) -> list[Field[Any]]:
        elsewhere = self._set_elsewhere(kind if isinstance(kind, type) else type(kind))
        return [field for field in fields(kind) if field.init and field.name not in elsewhere]

    def _set_elsewhere(self, kind: type) -> Mapping[str, str]:
        applies = self.only_of is None or issubclass(kind, resolve_name(self.only_of))
        return self.set_elsewhere if applies else getattr(kind, "SET_ELSEWHERE", {})

    def _known(self, kind: Any) -> list[str]:
        return ["name"] * self.has_name + [field.name for field in self._fields(kind)]


def _refused(error: PydanticCustomError) -> Any:
    def refuse(value: Any) -> Any:
        raise error

    return Annotated[Any, BeforeValidator(refuse)]


_SCORED = "the trainer scores samples under temperature, top_k, top_p and min_p alone"
SAMPLING = FieldsOf(
    "jaxtrain.sample.requests:SamplingParams",
    {
        "max_tokens": "rl.max_completion_length sets it",
        "n": "rl.generations sets it",
        "seed": "run.seed decides all samples",
        "stop_ids": "a sample ends at the model's own end tokens, and at the strings in sampling.stop",
        **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), _SCORED),
        **dict.fromkeys(("logit_bias", "allowed_ids", "trie", "grammar"), _SCORED),
        "skip_special_tokens": "rewards read texts without special tokens",
        "alternatives": "training does not read them",
        "logprobs": "training always reads them",
    },
)
ALGORITHM = FieldsOf(
    "jaxtrain.rl.algorithms:Algorithm",
    {
        "objective": "its fields are set in the section `objective`",
        "advantages": "name an algorithm with other advantages, or one of your own: file.py:NAME",
        "critic": "name an algorithm with a critic, or one of your own: file.py:NAME",
    },
)
OBJECTIVE = FieldsOf(
    "jaxtrain.objectives.policies:ClippedPolicy",  # whose fields the suggestions for unknown keys are from
    {
        "temperature": "sampling.temperature sets it",
        "max_completion_length": "rl.max_completion_length sets it",
    },
    has_name=True,
    only_of="jaxtrain.objectives.policy:PolicyObjective",
)
_OBJECTIVES = "jaxtrain.objectives"
_OF_ANSWERS = {"sign", "label"}  # of pairs and of labelled texts: what recipes preference and reward train on
_GIVEN_SIGNALS = {"sft": set(), "preference": {*_OF_ANSWERS, "ref_logps"}, "reward": _OF_ANSWERS}  # by recipe
_GIVEN_SIGNALS["distill"] = {"teacher_hidden", "teacher_ids", "teacher_logps"}
_GIVEN_SIGNALS["distill"] |= {"group_place", "teacher_probs", "teacher_further"}  # of another tokenizer
_DATA_SIGNALS = {*_OF_ANSWERS, "advantages", "sampler_logps"}  # given by data or samples, and never by `prepare`
_MEMBERS = ("needs", "signals", "separable", "__call__")


def resolve_algorithm(given: Any) -> Any:
    """The Algorithm of a name, or of a mapping with a `name` and other numbers."""
    given = {"name": given} if isinstance(given, str) else given
    if not isinstance(given, Mapping) or not isinstance(name := given.get("name"), str):
        raise ValueError("should be the name of an algorithm, or a mapping with a `name` and numbers of it")
    row = load_named(name, "rl.algorithm", f"{ALGORITHM.path.partition(':')[0]}:ALGORITHMS")
    if not isinstance(row, resolve_name(ALGORITHM.path)):
        raise ValueError(f"rl.algorithm={name} is not an Algorithm ({ALGORITHM.path}) but {type(row).__name__}")
    return ALGORITHM.apply(row, given)


def resolve_objective(given: Any, recipe: str, preset: Any) -> Any:
    """The Objective of a mapping: `preset`, or another class that its `name` names, with the given values."""
    given = {"name": given} if isinstance(given, str) else given
    if not isinstance(given, Mapping):
        raise ValueError("should be the name of a class, or a mapping with a `name` and values for its fields")
    kind: Any = load_named(given.get("name", type(preset)), "objective.name", _OBJECTIVES)
    name = _shown(kind)
    if not is_dataclass(kind) or inspect.isabstract(kind) or not all(hasattr(kind, member) for member in _MEMBERS):
        raise ValueError(
            f"objective.name={name} is not a dataclass with the members {', '.join(_MEMBERS)}, none abstract"
        )
    if recipe == "rl":
        policy = isinstance(preset, resolve_name(f"{_OBJECTIVES}:PolicyObjective"))
        # The algorithm's samples have the signals of no others.
        base: Any = resolve_name(f"{_OBJECTIVES}:PolicyObjective") if policy else type(preset)
        if not issubclass(cast(type, kind), base):
            needs = "recipe rl" if policy else "the algorithm"
            raise ValueError(
                f"objective.name={name} is not a subclass of {_OBJECTIVES}:{base.__name__}, which {needs} needs"
            )
    values = {key: given[key] for key in given if key != "name"}
    made = OBJECTIVE.apply(preset if kind is type(preset) else kind, values)
    if recipe == "rl":
        return made
    given_here = _GIVEN_SIGNALS[recipe]
    others = [name for name in made.signals if name not in given_here]
    missing = [name for name in others if name in _DATA_SIGNALS or not hasattr(made, "prepare")]
    if missing:
        raise ValueError(
            f"objective.name={name} needs the signals {', '.join(missing)}, which the rows of recipe {recipe} do not "
            "have: use it in a program, whose encoder gives them, or compute them in the objective's `prepare`"
        )
    if given_here >= _OF_ANSWERS and _OF_ANSWERS.isdisjoint(made.signals):
        raise ValueError(
            f"objective.name={name} reads neither pairs (signal sign) nor labels (signal label), which recipe {recipe} "
            "trains on"
        )
    return made


def _shown(kind: Any) -> str:
    """How a config names a class: by its name if it is exported by jaxtrain.objectives, else by its import path."""
    name, path = getattr(kind, "__name__", ""), str(import_path(kind))
    return name if getattr(resolve_name(_OBJECTIVES), name, None) is kind else path
