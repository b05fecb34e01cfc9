"""A first draft of a family's file: that of the most similar known family, with rows and keys matched to a checkpoint.

Names and shapes determine most of the draft. The rest is listed at its top, because with a tensor or a key that is not
read, the model would compute something else.
"""

import ast
import collections
import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

from converters.errors import ConversionError
from converters.families.keys import INERT_VALUES
from converters.families.registry import FAMILIES, Family
from converters.families.shared_keys import HONOURED, IGNORED, REFUSED
from converters.weight_rows import Shape, Weight, bind
from jaxtrain.nn.config import ModelConfig

_MIN_SIMILARITY = 0.5  # difflib's ratio between two tensor names, for a guess that they correspond


@dataclass(frozen=True)
class Draft:
    text: str  # Python source
    template: str  # the known family that it was made from
    problems: list[str]  # what has to be checked by hand


@dataclass(frozen=True)
class _Match:
    """How well the rows of a known family fit a checkpoint."""

    family: Family
    rows: list[tuple[Weight, Shape]]  # those that apply, with the shapes of their tensors
    score: int


def draft_family(
    name: str,
    hf: Mapping[str, Any],
    stored: Mapping[str, Shape],
    shapes_of: Callable[[ModelConfig], Mapping[str, Shape]],
) -> Draft:
    """The draft for a config.json and the shapes of its checkpoint's tensors.

    `shapes_of` returns the shapes of a config's parameters, by dotted path. Raises ConversionError if the architecture
    is supported already, or if no known family can read this config.json.
    """
    architecture, model_type = _names(hf)
    templates = _templates(stored)
    match = _nearest_family(hf, templates, shapes_of)
    rows, guessed, problems = _match_rows(match, templates)
    shared = {*HONOURED, *IGNORED, *REFUSED}
    unknown = {key: value for key, value in hf.items() if key not in shared and not _reads(match.family, hf, key)}
    problems += [
        f"key {key}={value!r} may change what is computed: read it, or keep it in INERT"
        for key, value in unknown.items()
    ]
    theirs = _their_defaults(model_type)
    if not theirs:
        problems.append("DEFAULTS holds this checkpoint's values: transformers does not know its config class")
    problems += [
        f"key {key}, which DEFAULTS has, is unknown to transformers for this model"
        for key in match.family.DEFAULTS
        if theirs and key not in theirs
    ]
    problems += [f"row of {row.ours}: {row.hf} is a guess, by its shape and name" for row in rows if row.hf in guessed]
    text = _write(
        name,
        architecture,
        model_type,
        match.family,
        {key: theirs.get(key, hf.get(key, value)) for key, value in match.family.DEFAULTS.items()},
        {**match.family.INERT, **{key: (value,) for key, value in unknown.items()}},
        [repr(row) for row in rows] if guessed else [],
        problems,
    )
    return Draft(text, match.family.MODEL_TYPE, problems)


def _names(hf: Mapping[str, Any]) -> tuple[str, str]:
    if not hf.get("architectures") or not hf.get("model_type"):
        raise ConversionError("config.json lacks architectures or model_type, which select the family")
    architecture, model_type = str(hf["architectures"][0]), str(hf["model_type"])
    for family in FAMILIES.values():
        if architecture == family.ARCHITECTURE or model_type == family.MODEL_TYPE:
            name = f"{architecture} (model_type {model_type})"
            raise ConversionError(f"{name} is already read by family {family.MODEL_TYPE}")
    return architecture, model_type


def _their_defaults(model_type: str) -> dict[str, Any]:
    """The defaults of transformers for keys that a config.json lacks; empty if it does not know the model."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return {}
    theirs = CONFIG_MAPPING[model_type]
    fields = {
        field.name: field.default for field in dataclasses.fields(theirs) if field.default is not dataclasses.MISSING
    }
    return {"rope_theta": theirs.default_theta, **fields}


def _reads(family: Family, hf: Mapping[str, Any], key: str) -> bool:
    """Whether the family reads or refuses a key: it is in its tables, or another value changes the config."""
    if key in {*family.DEFAULTS, *family.INERT, *INERT_VALUES, "rope_parameters", "rope_scaling", "rope_theta"}:
        return True
    try:
        return family.from_hf({**hf, key: "?"}) != family.from_hf(hf)
    except ValueError:
        return True


def _templates(stored: Mapping[str, Shape]) -> dict[str, Shape]:
    """Tensor names with `{layer}` for the first number and `{expert}` for the second."""
    templates = {}
    for name, shape in stored.items():
        for field in ("{layer}", "{expert}"):
            name = re.sub(r"(?<=\.)\d+(?=\.)", field, name, count=1)
        templates[name] = shape
    return templates


def _nearest_family(
    hf: Mapping[str, Any], templates: Mapping[str, Shape], shapes_of: Callable[[ModelConfig], Mapping[str, Shape]]
) -> _Match:
    matches, refusals = [], []
    for family in FAMILIES.values():
        try:
            config = family.from_hf(hf)
        except ValueError as error:
            refusals.append(f"{family.MODEL_TYPE}: {error}")
            continue
        shapes = shapes_of(config)
        expected = {t.ours: t.shape for t in bind(family.WEIGHTS, shapes, config) if not t.alias}
        rows = [(row, expected[row.ours]) for row in family.WEIGHTS if row.ours in expected and not row.alias]
        named = sum(templates.get(row.hf) == shape for row, shape in rows)
        same_shape = collections.Counter(shape for _, shape in rows) & collections.Counter(templates.values())
        matches.append(_Match(family, rows, 2 * named + same_shape.total() - abs(len(rows) - len(templates))))
    if not matches:
        raise ConversionError("no known family can read this config.json:\n  " + "\n  ".join(refusals))
    return max(matches, key=lambda match: match.score)


def _match_rows(match: _Match, templates: Mapping[str, Shape]) -> tuple[list[Weight], set[str], list[str]]:
    """The rows for these tensors, the tensor names that were guessed, and a problem for all without a match."""
    named = {row.hf for row, shape in match.rows if templates.get(row.hf) == shape}
    free = {name: shape for name, shape in templates.items() if name not in named}
    pairs = [
        (difflib.SequenceMatcher(None, row.hf, name).ratio(), row, name)
        for row, shape in match.rows
        if row.hf not in named
        for name, other in free.items()
        if other == shape
    ]
    found = {row.ours: row for row, _ in match.rows if row.hf in named}
    guessed: set[str] = set()
    for similarity, row, name in sorted(pairs, key=lambda pair: -pair[0]):
        if similarity >= _MIN_SIMILARITY and row.ours not in found and name not in guessed:
            found[row.ours] = dataclasses.replace(row, hf=name)
            guessed.add(name)
    problems = [
        f"parameter {row.ours}: no tensor {row.hf} {list(shape)}, nor a similar one"
        for row, shape in match.rows
        if row.ours not in found
    ]
    elsewhere = {row.hf: (row.ours, other.MODEL_TYPE) for other in FAMILIES.values() for row in other.WEIGHTS}
    for name in sorted(free.keys() - guessed):
        ours, other = elsewhere.get(name, ("", ""))
        hint = f"; family {other} maps it to {ours}, which its from_hf enables" if ours else ""
        problems.append(f"tensor {name} {list(free[name])}: no row{hint}")
    return [found[row.ours] for row, _ in match.rows if row.ours in found], guessed, problems


def _write(
    name: str,
    architecture: str,
    model_type: str,
    template: Family,
    defaults: Mapping[str, Any],
    inert: Mapping[str, Any],
    rows: list[str],
    problems: list[str],
) -> str:
    """The source of the template family with these names, values and rows; without `rows`, its rows are kept."""
    values = {
        "ARCHITECTURE": repr(architecture),
        "MODEL_TYPE": repr(model_type),
        "DEFAULTS": _literal("{}", [f"{key!r}: {value!r}" for key, value in defaults.items()]),
        "INERT": _literal("{}", [f"{key!r}: {value!r}" for key, value in inert.items()]),
        **({"WEIGHTS": _literal("()", rows)} if rows else {}),
    }
    notes = [
        f'"""{architecture}: a draft, made from family {template.MODEL_TYPE}."""',
        "",
        f"# Made by `jaxtrain new-family {name}`; check with `jaxtrain verify`. Resolve and delete each of these:",
        *(f"# - {problem}" for problem in problems),
    ]
    source = inspect.getsource(cast(ModuleType, template))
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        start, stop = node.lineno - 1, node.end_lineno
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(node, ast.Assign):
            (target,) = node.targets
        if isinstance(target, ast.Name) and target.id in values:
            declared = lines[start].partition("=")[0].rstrip()
            # The comments on the old values do not apply to the new ones.
            while lines[start - 1].startswith("#"):
                start -= 1
            lines[start:stop] = [f"{declared} = {values[target.id]}"]
        elif start == 0:
            lines[start:stop] = notes
        elif rows and isinstance(node, ast.ImportFrom) and node.module == "converters.families.keys":
            lines[stop:stop] = ["from converters.weight_rows import PadVocab, Split, Transpose, Weight"]
    return "\n".join(lines) + "\n"


def _literal(brackets: str, items: list[str]) -> str:
    return "\n".join([brackets[0], *(f"    {item}," for item in items), brackets[1]])
