"""A first draft of a family's file: the nearest known family's, with rows and keys matched to a checkpoint.

What names and shapes tell is filled in; what they do not is listed at the top of the draft, since a tensor that is
passed over or a key that is not read is a model that computes something else.
"""

from __future__ import annotations

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

from converters.errors import CheckpointError
from converters.families.keys import INERT_VALUES
from converters.families.registry import FAMILIES, Family
from converters.rows import Shape, Weight, bind
from jaxtrain.nn.config import ModelConfig

_ALIKE = 0.5  # difflib's ratio of two tensors' names, from which on one may be the other
# Keys that every config.json may have and that no forward pass reads.
SILENT = {
    *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "attention_dropout", "_attn_implementation"),
    *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "id2label", "label2id"),
    *("is_encoder_decoder", "problem_type", "tokenizer_class", "add_cross_attention", "is_decoder"),
    *("hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
}


@dataclass(frozen=True)
class Draft:
    text: str  # Python source
    relative: str  # the known family it was made from
    open: list[str]  # what somebody has to look at


@dataclass(frozen=True)
class _Match:
    """A known family, and how a checkpoint looks through its rows."""

    family: Family
    rows: list[tuple[Weight, Shape]]  # those that apply, and what shape of tensor they take
    score: int


def draft_family(
    name: str,
    hf: Mapping[str, Any],
    stored: Mapping[str, Shape],
    shapes_of: Callable[[ModelConfig], Mapping[str, Shape]],
) -> Draft:
    """The draft for a config.json and the shapes of its checkpoint's tensors.

    `shapes_of` says what parameters a config of ours has, by dotted path. Raises CheckpointError where the
    architecture has a family already, or no known family can read this config.json at all.
    """
    architecture, model_type = _names(hf)
    templates = _templates(stored)
    match = _nearest_family(hf, templates, shapes_of)
    rows, guessed, problems = _match_rows(match, templates)
    unknown = {key: value for key, value in hf.items() if key not in SILENT and not _minds(match.family, hf, key)}
    problems += [
        f"key {key}={value!r} may change the maths: read it, or keep it in INERT" for key, value in unknown.items()
    ]
    theirs = _their_defaults(model_type)
    if not theirs:
        problems.append("DEFAULTS holds this checkpoint's values: transformers does not know its config class")
    problems += [
        f"key {key}, which DEFAULTS reads, is none of theirs"
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
        raise CheckpointError("config.json names no architectures or no model_type, by which a family is found")
    architecture, model_type = str(hf["architectures"][0]), str(hf["model_type"])
    for family in FAMILIES.values():
        if architecture == family.ARCHITECTURE or model_type == family.MODEL_TYPE:
            raise CheckpointError(f"{architecture} is what family {family.MODEL_TYPE} reads already")
    return architecture, model_type


def _their_defaults(model_type: str) -> dict[str, Any]:
    """What transformers takes for the keys that a config.json lacks; nothing where it does not know the model."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return {}
    theirs = CONFIG_MAPPING[model_type]
    fields = {
        field.name: field.default for field in dataclasses.fields(theirs) if field.default is not dataclasses.MISSING
    }
    return {"rope_theta": theirs.default_theta, **fields}


def _minds(family: Family, hf: Mapping[str, Any], key: str) -> bool:
    """Whether the family reads a key, or refuses it: one that its tables name, or where another value matters."""
    if key in {*family.DEFAULTS, *family.INERT, *INERT_VALUES, "rope_parameters", "rope_scaling", "rope_theta"}:
        return True
    try:
        return family.from_hf({**hf, key: "?"}) != family.from_hf(hf)
    except ValueError:
        return True


def _templates(stored: Mapping[str, Shape]) -> dict[str, Shape]:
    """Tensor names with `{layer}`, and `{expert}` where there is a second number, instead of numbers."""
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
        alike = collections.Counter(shape for _, shape in rows) & collections.Counter(templates.values())
        matches.append(_Match(family, rows, 2 * named + alike.total() - abs(len(rows) - len(templates))))
    if not matches:
        raise CheckpointError("no known family can read this config.json:\n  " + "\n  ".join(refusals))
    return max(matches, key=lambda match: match.score)


def _match_rows(match: _Match, templates: Mapping[str, Shape]) -> tuple[list[Weight], set[str], list[str]]:
    """The rows for these tensors, the names of those that were guessed, and what found no partner on either side."""
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
    for alike, row, name in sorted(pairs, key=lambda pair: -pair[0]):
        if alike >= _ALIKE and row.ours not in found and name not in guessed:
            found[row.ours] = dataclasses.replace(row, hf=name)
            guessed.add(name)
    problems = [
        f"parameter {row.ours}: no tensor {row.hf} {list(shape)}, nor one like it"
        for row, shape in match.rows
        if row.ours not in found
    ]
    elsewhere = {row.hf: (row.ours, other.MODEL_TYPE) for other in FAMILIES.values() for row in other.WEIGHTS}
    for name in sorted(free.keys() - guessed):
        ours, other = elsewhere.get(name, ("", ""))
        hint = f"; family {other} has it as {ours}, which from_hf switches on there" if ours else ""
        problems.append(f"tensor {name} {list(free[name])}: no row{hint}")
    return [found[row.ours] for row, _ in match.rows if row.ours in found], guessed, problems


def _write(
    name: str,
    architecture: str,
    model_type: str,
    relative: Family,
    defaults: Mapping[str, Any],
    inert: Mapping[str, Any],
    rows: list[str],
    problems: list[str],
) -> str:
    """The relative's source with these names, values and rows; `rows` may be empty, then its own stay."""
    values = {
        "ARCHITECTURE": repr(architecture),
        "MODEL_TYPE": repr(model_type),
        "DEFAULTS": _literal("{}", [f"{key!r}: {value!r}" for key, value in defaults.items()]),
        "INERT": _literal("{}", [f"{key!r}: {value!r}" for key, value in inert.items()]),
        **({"WEIGHTS": _literal("()", rows)} if rows else {}),
    }
    notes = [
        f'"""{architecture}: a draft, made from family {relative.MODEL_TYPE}."""',
        "",
        f"# Made by `jaxtrain new-family {name}`; `jaxtrain verify` is the judge. Look at each of these and delete it:",
        *(f"# - {problem}" for problem in problems),
    ]
    source = inspect.getsource(cast(ModuleType, relative))
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        start, stop = node.lineno - 1, node.end_lineno
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(node, ast.Assign):
            (target,) = node.targets
        if isinstance(target, ast.Name) and target.id in values:
            declared = lines[start].partition("=")[0].rstrip()
            # What the relative says of its own values is not so of these.
            while lines[start - 1].startswith("#"):
                start -= 1
            lines[start:stop] = [f"{declared} = {values[target.id]}"]
        elif start == 0:
            lines[start:stop] = notes
        elif rows and isinstance(node, ast.ImportFrom) and node.module == "converters.families.keys":
            lines[stop:stop] = ["from converters.rows import PadVocab, Split, Transpose, Weight"]
    return "\n".join(lines) + "\n"


def _literal(brackets: str, items: list[str]) -> str:
    return "\n".join([brackets[0], *(f"    {item}," for item in items), brackets[1]])
