"""Distinguishes nulls that a file format has added from nulls that were written.

Arrow, and so Parquet and the `datasets` library, gives every element of a column one struct type: each message, tool
call and tool schema then carries the keys of all others, as null. A chat template would render them. Which nulls were
written is decided by the best evidence available. First, whether the row has fillings at all:

- Parquet and Arrow: always.
- JSON: where the row has the form that `datasets` writes. All messages of a column then have the same keys, with a null
  beside the content or `tool_calls` that hold nothing, or a tool's parameters have a null where a schema cannot hold
  one; and all arguments of calls have the same keys. Dumps of OpenAI's responses, with `refusal: null` in the
  assistant's messages alone, have not.

Then, of a null in the arguments of a call in such a row:

- If the schema of the called function is in `tools`: a parameter that it does not have is a filling, one that is
  required was written.
- Else, in Parquet, a key whose type is `null` has no value in any row, so some row wrote that null, and it stays.
- Any other null is taken for a filling: a guess, which is noted. Where it is an optional parameter, leaving it out
  means the same.

A null that a tool schema cannot hold (anything but a `default`, a `const` or an element of an `enum`) is a filling in
any file, and so is a null in a tool call outside its arguments. Arguments that are JSON strings are never touched.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import pyarrow as pa

_MEANT_IN_SCHEMAS = ("default", "const")  # keys of JSON schema whose value may be null


def without_arrow_fillings(value: Any, kind: pa.DataType, tools: Any, guessed: list[str]) -> Any:
    """`value`, of the Arrow type `kind`, without the nulls that the type added. `tools`: the tools of the row.

    The names of arguments whose null was taken for a filling without evidence are added to `guessed`.
    """
    if value is None:
        return None
    if pa.types.is_struct(kind):
        kept = {}
        for field in kind:
            inner = value[field.name]
            if field.name == "arguments" and isinstance(inner, dict):
                kept[field.name] = _arguments(inner, parameters_of(tools, value.get("name")), guessed, field.type)
            elif field.name in _MEANT_IN_SCHEMAS and (inner is not None or pa.types.is_null(field.type)):
                kept[field.name] = _arguments(inner, None, [], field.type)
            elif inner is not None:
                kept[field.name] = without_arrow_fillings(inner, field.type, tools, guessed)
        return kept
    of_element = _element(kind)
    if isinstance(value, list) and of_element is not None:
        return [without_arrow_fillings(each, of_element, tools, guessed) for each in value]
    return value


def parameters_of(tools: Any, name: Any) -> Any:
    """The JSON schema of the parameters of the tool `name`; None where `tools`, or their JSON, have none."""
    for tool in _plain(tools) if isinstance(_plain(tools), list) else ():
        tool = _plain(tool)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and name is not None and function.get("name") == name:
            return function.get("parameters")
    return None


def written_by_datasets(columns: Iterable[list[Any]], tools: Any) -> bool:
    """Whether a row has the form that `datasets` writes. `columns`: its lists of messages."""
    columns = [[message for message in messages if isinstance(message, dict)] for messages in columns]
    messages = [message for column in columns for message in column]
    empty = any(
        (value is None and key not in ("content", "value")) or (key == "tool_calls" and not value)
        for message in messages
        for key, value in message.items()
    )
    filled = (empty and all(map(_same_keys, columns))) or any(
        tool_without_fillings(properties, filled=False, names=True) != properties
        for properties in (_properties(tools) if tools else ())
    )
    return filled and _same_keys([arguments for message in messages for arguments in _mappings(message)])


def _same_keys(mappings: list[dict[str, Any]]) -> bool:
    return all(mapping.keys() == mappings[0].keys() for mapping in mappings)


def _properties(tools: Any) -> Iterator[Any]:
    """The schemas of the parameters of every tool, by their names."""
    for tool in tools if isinstance(tools, list) else ():
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        parameters = function.get("parameters") if isinstance(function, dict) else None
        if isinstance(parameters, dict):
            yield parameters.get("properties")


def _mappings(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments of a message's tool calls, where they are mappings."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            yield function["arguments"]


def _arguments(value: Any, schema: Any, guessed: list[str], kind: pa.DataType | None = None) -> Any:
    """A value in the arguments of a call, without fillings. `kind`: its Arrow type; None in JSON."""
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, dict) else None
        return [_arguments(each, items, guessed, _element(kind)) for each in value]
    if not isinstance(value, dict) or (kind is not None and not pa.types.is_struct(kind)):
        return value  # the keys of an Arrow map are those that were written
    kept = {}
    for key, inner in value.items():
        of_key = kind.field(key).type if kind is not None else None
        origin = "written" if inner is not None else _origin(key, schema, of_key)
        if origin == "guess":
            guessed.append(key)
        if origin == "written":
            properties = schema.get("properties") if isinstance(schema, dict) else None
            kept[key] = _arguments(
                inner, properties.get(key) if isinstance(properties, dict) else None, guessed, of_key
            )
    return kept


def _origin(key: str, schema: Any, kind: pa.DataType | None) -> Literal["written", "filling", "guess"]:
    """Where a null of an argument comes from; "guess" where there is no evidence and it is taken for a filling."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if isinstance(properties, dict):
        if properties.get(key) is None:
            return "filling"
        if key in (schema.get("required") or ()):
            return "written"
    return "written" if kind is not None and pa.types.is_null(kind) else "guess"


def _element(kind: pa.DataType | None) -> pa.DataType | None:
    if kind is not None and isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        return kind.value_type
    return None


def _plain(value: Any) -> Any:
    """`value`, or the value that it encodes as JSON; invalid JSON is returned as text and rejected later."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def without_nulls(value: Any) -> Any:
    """`value` without the keys that are null, at any depth. Elements of lists stay."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def left_out_warning(guessed: Iterable[str]) -> str:
    """About nulls that were taken for fillings without evidence."""
    names = ", ".join(dict.fromkeys(guessed))
    return (
        f"tool calls have arguments that are null ({names}) and that cannot be distinguished from the nulls which a "
        "file format adds: they are left out, and such rows are counted as nulls_left_out. Arguments that are JSON "
        "strings keep their nulls, and so do arguments that the tool's schema requires"
    )


def tool_call_without_fillings(call: dict[str, Any], tools: Any, guessed: list[str] | None) -> dict[str, Any]:
    """A tool call {name, arguments} or {function: {name, arguments}}.

    `guessed` gets the names of arguments whose null was taken for a filling without evidence; None: the row has no
    fillings.
    """
    kept = {key: value for key, value in call.items() if value is not None or key == "arguments"}
    inner = kept.get("function")
    if isinstance(inner, dict):
        kept["function"] = tool_call_without_fillings(inner, tools, guessed)
    if guessed is not None and "arguments" in kept:
        kept["arguments"] = _arguments(kept["arguments"], parameters_of(tools, kept.get("name")), guessed)
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
