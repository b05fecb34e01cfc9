import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import QWEN25, tokenizer

from jaxtrain.config import SourceSection
from jaxtrain.data.formats import Encoder
from jaxtrain.data.nulls import (
    tool_call_without_fillings,
    tool_without_fillings,
    without_arrow_fillings,
    written_by_datasets,
)
from jaxtrain.data.sources import Source


def talk(name, arguments, **beside):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "user", "content": "q", **beside},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "r", **beside},
        {"role": "assistant", "content": "A", **beside},
    ]


ROWS = [
    {"messages": talk("f", {"a": 1, "nothing": None})},
    {"messages": talk("g", {"nothing": None, "city": "x"})},
]


def rendered(path):
    source, tok = Source(SourceSection(path=str(path))), tokenizer(QWEN25)
    return [tok.decode(source.make(index, Encoder(tok)).input_ids) for index in range(len(source))]


def write(tmp_path, rows, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_parquet_keeps_the_nulls_that_no_other_row_explains(tmp_path):
    first, second = rendered(write(tmp_path, ROWS, "a.parquet"))
    assert '"arguments": {"a": 1, "nothing": null}' in first
    assert '"arguments": {"nothing": null, "city": "x"}' in second


def test_the_fillings_of_datasets_are_not_rendered(tmp_path):
    # What `datasets` writes as JSON: every struct has the keys of all others.
    filled = [
        {"messages": talk("f", {"a": 1, "city": None}, tool_calls=None)},
        {"messages": talk("g", {"a": None, "city": "x"}, tool_calls=None)},
    ]
    first, second = rendered(write(tmp_path, filled, "a.jsonl"))
    assert '"arguments": {"a": 1}' in first and '"arguments": {"city": "x"}' in second


def test_nulls_that_a_person_wrote_as_json_are_kept(tmp_path):
    first, second = rendered(write(tmp_path, ROWS, "a.jsonl"))
    assert '"arguments": {"a": 1, "nothing": null}' in first
    assert '"arguments": {"nothing": null, "city": "x"}' in second
    text = [{"messages": talk("f", json.dumps({"a": None}), tool_calls=None)}]
    assert '"arguments": {"a": null}' in rendered(write(tmp_path, text, "b.jsonl"))[0]


def tool(name, properties):
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_parameters_of_other_tools_are_not_rendered(tmp_path, name):
    tools = [tool("f", {"a": {"type": "string"}, "b": None}), tool("g", {"a": None, "b": {"type": "string"}})]
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "A"}]
    (text,) = rendered(write(tmp_path, [{"messages": chat, "tools": tools}], name))
    assert '"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}' in text
    assert '"name": "g", "parameters": {"properties": {"b": {"type": "string"}}}' in text


def test_a_schema_keeps_the_nulls_that_mean_something():
    schema = {
        "default": None,
        "enum": ["x", None],
        "properties": {"default": None, "b": {"const": None, "title": None}},
    }
    kept = {"default": None, "enum": ["x", None], "properties": {"b": {"const": None}}}
    assert tool_without_fillings(schema, filled=False) == kept
    assert tool_without_fillings(schema, filled=True) == {"enum": ["x", None], "properties": {"b": {}}}


def test_a_call_loses_the_nulls_outside_of_its_arguments():
    call = {"id": None, "function": {"name": "f", "strict": None, "arguments": {"a": None, "b": [{"c": None}]}}}
    kept = {"function": {"name": "f", "arguments": {"a": None, "b": [{"c": None}]}}}
    assert tool_call_without_fillings(call, filled=False) == kept
    assert tool_call_without_fillings(call, filled=True) == {"function": {"name": "f", "arguments": {"b": [{}]}}}


@pytest.mark.parametrize(
    ("message", "filled"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, False),
        ({"from": "gpt", "value": None}, False),
        ({"role": "user", "content": "x", "tool_calls": None}, True),
        ({"role": "user", "content": "x", "tool_calls": []}, True),
        ({"role": "user", "content": "x", "name": None}, True),
    ],
)
def test_a_null_beside_the_content_shows_who_wrote_the_file(message, filled):
    assert written_by_datasets([{"role": "user", "content": "x"}, message]) == filled


def test_maps_and_columns_that_no_template_reads_keep_their_nulls(tmp_path):
    kind = pa.map_(pa.string(), pa.int64())
    assert without_arrow_fillings({"a": None, "b": 1}, kind) == {"a": None, "b": 1}
    rows = [{"prompt": "q", "extra": {"a": 1, "b": None}}, {"prompt": "p", "extra": {"a": None, "b": 2}}]
    source = Source(SourceSection(path=str(write(tmp_path, rows, "a.parquet"))), keep_columns=True)
    assert [source[0], source[1]] == rows  # rewards read them
