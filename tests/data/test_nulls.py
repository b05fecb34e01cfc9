import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import QWEN25, tokenizer

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.formats import Encoder
from jaxtrain.data.lengths import row_counts
from jaxtrain.data.nulls import (
    tool_call_without_fillings,
    tool_without_fillings,
    without_arrow_fillings,
    written_by_datasets,
)
from jaxtrain.data.pipeline import TrainStream
from jaxtrain.data.shards import Reader
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


def rendered(path, guessed=()):
    """The text of each row. `guessed`: the rows that are counted for nulls that may have been written."""
    section, tok = SourceSection(path=str(path)), tokenizer(QWEN25)
    with warnings.catch_warnings(), ThreadPoolExecutor(1) as executor:
        warnings.simplefilter("ignore")
        reader = Reader([Source(section)], DataSection(train=section, max_length=1000), Encoder(tok))
        read = reader.submit(executor, [(0, row) for row in range(len(reader.sources[0]))]).result()
    assert [row for row, each in enumerate(read) if each.events] == list(guessed)
    assert {event for each in read for event in each.events} <= {"nulls_left_out"}
    return [tok.decode(each.items[0][0].input_ids) for each in read]


def write(tmp_path, rows, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_parquet_keeps_the_nulls_that_no_other_row_explains(tmp_path):
    first, second = rendered(write(tmp_path, ROWS, "a.parquet"), guessed=[0, 1])  # of `a` and `city`
    assert '"arguments": {"a": 1, "nothing": null}' in first
    assert '"arguments": {"nothing": null, "city": "x"}' in second


def test_the_fillings_of_datasets_are_not_rendered(tmp_path):
    # What `datasets` writes as JSON: every struct has the keys of all others.
    filled = [
        {"messages": talk("f", {"a": 1, "city": None}, tool_calls=None)},
        {"messages": talk("g", {"a": None, "city": "x"}, tool_calls=None)},
    ]
    first, second = rendered(write(tmp_path, filled, "a.jsonl"), guessed=[0, 1])
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
    assert tool_call_without_fillings(call, None, None) == kept
    assert tool_call_without_fillings(call, None, guessed := []) == {
        "function": {"name": "f", "arguments": {"b": [{}]}}
    }
    assert guessed == ["a", "c"]


def call(**arguments):
    return [{"function": {"name": "f", "arguments": arguments}}]


USER = {"role": "user", "content": "x"}
ANSWER = {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("messages", "filled"),
    [
        ([USER, {"role": "assistant", "content": None}], False),
        ([{"from": "human", "value": "x"}, {"from": "gpt", "value": None}], False),
        ([USER | {"tool_calls": None}, ANSWER | {"tool_calls": None}], True),
        ([USER | {"tool_calls": []}, ANSWER | {"tool_calls": []}], True),
        ([USER | {"name": None}, ANSWER | {"name": "a"}], True),
        ([USER | {"name": "a"}, ANSWER | {"name": "b"}], False),  # nothing is null
        # Dumps of OpenAI's responses, with the keys of an assistant in its messages alone.
        ([USER, ANSWER | {"refusal": None, "tool_calls": []}], False),
        ([USER, ANSWER | {"refusal": None, "audio": None, "tool_calls": call(a=None)}], False),
        # Records that always have all keys, whose arguments are mappings as they were.
        ([USER | {"name": None, "tool_calls": call(a=None)}, ANSWER | {"name": None, "tool_calls": call(b=1)}], False),
        ([USER | {"name": None, "tool_calls": call(a=None)}, ANSWER | {"name": None, "tool_calls": call(a=1)}], True),
    ],
)
def test_the_keys_of_all_messages_show_who_wrote_the_file(messages, filled):
    assert written_by_datasets([messages], None) == filled


@pytest.mark.parametrize(
    ("schema", "filled"),
    [
        ({"properties": {"a": {"type": "string"}, "b": None}}, True),
        ({"properties": {"a": {"type": "string", "enum": None}}}, True),
        ({"properties": {"a": {"default": None}}}, False),
        ({"properties": {"a": {"type": "string"}}, "required": None}, False),  # by hand, or by pydantic
    ],
)
def test_a_null_that_no_parameter_can_have_shows_who_wrote_the_file(schema, filled):
    tools = [{"type": "function", "function": {"name": "f", "description": None, "parameters": schema}}]
    assert written_by_datasets([[USER, ANSWER]], tools) == filled


def test_dumps_of_openai_keep_the_nulls_of_arguments(tmp_path):
    rows = [{"messages": [*talk("f", {"a": 1, "unit": None})[:-1], ANSWER | {"refusal": None, "tool_calls": []}]}]
    assert '"arguments": {"a": 1, "unit": null}' in rendered(write(tmp_path, rows, "a.jsonl"))[0]


REQUIRED = {
    "type": "object",
    "properties": {
        "city": {"type": ["string", "null"]},
        "unit": {"type": "string"},
        "where": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
    "required": ["city"],
}


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize("as_text", [False, True])
def test_the_schema_of_a_tool_tells_which_nulls_were_written(tmp_path, name, as_text):
    """The same for Parquet and for what `datasets` writes as JSON, with the schemas as they are and as JSON."""
    tools = [tool("f", REQUIRED["properties"]), tool("g", {"day": {"type": "string"}})]
    tools[0]["function"]["parameters"]["required"] = ["city"]
    tools = json.dumps(tools) if as_text else [json.dumps(each) for each in tools]
    rows = [
        {"messages": talk("f", {"city": None, "unit": None, "where": {"x": None, "y": None}, "day": None})},
        {"messages": talk("g", {"city": None, "unit": None, "where": None, "day": "Monday"})},
        {"messages": talk("f", {"city": "Rome", "unit": "C", "where": {"x": 1, "y": 2}, "day": None})},
    ]
    for row in rows:
        row["tools"] = tools
        for message in row["messages"]:
            message.setdefault("tool_calls", None)
    texts = rendered(write(tmp_path, rows, name), guessed=[0])  # of `unit`; `day` and `city` are of the other tool
    assert '"arguments": {"city": null, "where": {"x": null}}' in texts[0]
    assert '"arguments": {"day": "Monday"}' in texts[1]
    assert '"arguments": {"city": "Rome", "unit": "C", "where": {"x": 1, "y": 2}}' in texts[2]


def test_a_null_column_of_arguments_is_not_rendered_in_calls_of_other_tools(tmp_path):
    tools = json.dumps([tool("f", {"a": {}, "nothing": {}}), tool("g", {"city": {}})])
    rows = [
        {"messages": talk("f", {"a": 1, "nothing": None}), "tools": tools},
        {"messages": talk("g", {"city": "x"}), "tools": tools},
    ]
    first, second = rendered(write(tmp_path, rows, "a.parquet"))
    assert '"arguments": {"a": 1, "nothing": null}' in first and '"arguments": {"city": "x"}' in second


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_nulls_that_may_have_been_written_are_warned_of_and_counted(tmp_path, name):
    beside = {"tool_calls": None}  # as `datasets` fills it
    rows = [{"messages": talk("f", arguments, **beside)} for arguments in ({"a": 1, "b": None}, {"a": 1, "b": 2})] * 2
    section = SourceSection(path=str(write(tmp_path, rows, name)), epochs=1)
    data = DataSection(train=section, max_length=100, shuffle=False)
    with pytest.warns(UserWarning, match=r"are null \(b\) .*counted as nulls_left_out") as said:
        encode = Encoder(tokenizer(QWEN25))
        with TrainStream([section], data, encode, rows=1, seed=0, shards=[0], num_shards=1) as stream:
            lengths = stream.lengths(None)
            assert len(list(stream)) and stream.stats["nulls_left_out"] == row_counts(lengths)["nulls_left_out"] == 2
    assert len(said) == 1
    with pytest.warns(UserWarning, match="nulls_left_out"):
        Encoder(tokenizer(QWEN25)).question(Source(section)[0])


def test_maps_and_columns_that_no_template_reads_keep_their_nulls(tmp_path):
    kind = pa.map_(pa.string(), pa.int64())
    assert without_arrow_fillings({"a": None, "b": 1}, kind, None, []) == {"a": None, "b": 1}
    rows = [{"prompt": "q", "extra": {"a": 1, "b": None}}, {"prompt": "p", "extra": {"a": None, "b": 2}}]
    source = Source(SourceSection(path=str(write(tmp_path, rows, "a.parquet"))), keep_columns=True)
    assert [source[0], source[1]] == rows  # rewards read them
