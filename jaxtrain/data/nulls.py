"""Nulls that a file format has added, told from nulls that were written.

Arrow, and so Parquet and the `datasets` library, gives every element of a column one struct type: each message, tool
call and tool schema then carries the keys of all others, as null. A chat template would render them. Which nulls were
written is decided by the best evidence that there is:

- Parquet: a key whose type is `null` has no value in any row, so some row wrote that null, and it stays where a null
  has a meaning. Any other null in a struct is taken for a filling.
- JSON: what is written stays, unless the row shows that `datasets` wrote the file: a message with a null beside its
  content, `tool_calls` that hold nothing, or a null where a tool schema cannot hold one. Then every null in its tool
  calls, tool schemas and template arguments is a filling.
- In both, a null that a tool schema cannot hold (anything but a `default`, a `const` or an element of an `enum`) is a
  filling, and so is a null in a tool call outside its arguments.

Arguments that are JSON strings are never touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

_MEANT_IN_SCHEMAS = ("default", "const")  # keys of JSON schema whose value may be null
_MEANT = ("arguments", *_MEANT_IN_SCHEMAS)  # keys at or below which a null in Parquet may have been written


def without_arrow_fillings(value: Any, kind: pa.DataType, *, meant: bool = False) -> Any:
    """`value`, of the Arrow type `kind`, without the nulls that the type added. `meant`: a null here has a meaning."""
    if value is None:
        return None
    if pa.types.is_struct(kind):
        kept = {}
        for field in kind:
            inner, inner_meant = value[field.name], meant or field.name in _MEANT
            if inner is not None or (inner_meant and pa.types.is_null(field.type)):
                kept[field.name] = without_arrow_fillings(inner, field.type, meant=inner_meant)
        return kept
    if isinstance(value, list) and isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        return [without_arrow_fillings(inner, kind.value_type, meant=meant) for inner in value]
    return value


def written_by_datasets(messages: Iterable[Any]) -> bool:
    """Whether a message has keys of other messages: a null beside its content, or `tool_calls` that hold nothing."""
    return any(
        (value is None and key not in ("content", "value")) or (key == "tool_calls" and not value)
        for message in messages
        if isinstance(message, dict)
        for key, value in message.items()
    )


def without_nulls(value: Any) -> Any:
    """`value` without the keys that are null, at any depth. Elements of lists stay."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def tool_call_without_fillings(call: dict[str, Any], *, filled: bool) -> dict[str, Any]:
    """A tool call {name, arguments} or {function: {name, arguments}}. `filled`: nulls in its arguments are fillings."""
    kept = {key: value for key, value in call.items() if value is not None or key == "arguments"}
    inner = kept.get("function")
    if isinstance(inner, dict):
        kept["function"] = tool_call_without_fillings(inner, filled=filled)
    if filled and "arguments" in kept:
        kept["arguments"] = without_nulls(kept["arguments"])
    return kept


def tool_without_fillings(schema: Any, *, filled: bool, names: bool = False) -> Any:
    """A tool's JSON schema. `filled`: a null `default` or `const` is a filling too. `names`: keys are parameters'."""
    if isinstance(schema, list):
        return [tool_without_fillings(inner, filled=filled) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, inner in schema.items():
        values = key in _MEANT_IN_SCHEMAS and not names
        if inner is not None or (values and not filled):
            kept[key] = inner if values else tool_without_fillings(inner, filled=filled, names=key == "properties")
    return kept
