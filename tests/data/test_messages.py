import json

import pytest

from jaxtrain.data.messages import conversation, keys_of_messages, question

CHAT = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "Paris"}]


def test_a_conversation_tells_the_prompt_from_what_is_trained():
    found = conversation({"prompt": CHAT + CHAT[:1], "completion": CHAT[1:]})
    assert found.messages == CHAT + CHAT and found.first_trained == 3
    assert found.weights == [None] * 4
    assert found.trained("assistant") == [0, 0, 0, 1] and found.trained("all") == [1, 1, 1, 1]


def test_weights_leave_the_messages():
    found = conversation({"messages": [CHAT[0] | {"weight": 0}, CHAT[1] | {"train": True}]})
    assert found.messages == CHAT and found.weights == [0, 1]
    assert found.trained("assistant") == [0, 1] and found.trained("all") == [0, 1]


def test_sharegpt_messages_keep_their_other_keys():
    call = {"name": "f", "arguments": {}}
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": None, "tool_calls": [call], "train": False}]
    found = conversation({"conversations": [*talk, {"from": "tool", "value": "r"}, {"from": "gpt", "value": "A"}]})
    assert found.messages[1] == {"role": "assistant", "content": None, "tool_calls": [call]}
    assert found.weights == [None, 0, None, None]


def test_a_question_is_a_string_or_messages():
    assert question({"prompt": "What"}).messages == CHAT[:1]
    found = question({"prompt": CHAT[:1], "tools": '[{"name": "f"}]', "chat_template_kwargs": {"a": 1}})
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert (found.messages, found.tools, found.template_kwargs) == (CHAT[:1], tools, {"a": 1})


def test_functions_are_tools():
    """OpenAI's old column."""
    functions = [{"name": "f", "parameters": {"type": "object"}}]
    tools = [{"type": "function", "function": functions[0]}]
    flat = [{"type": "function", **functions[0]}]  # OpenAI's Responses API
    filled = [{**functions[0], "type": None, "function": None}]
    for value in (functions, json.dumps(functions), tools, flat, filled):
        for column in ("functions", "tools"):
            assert conversation({"messages": CHAT, column: value}).tools == tools
    assert conversation({"messages": CHAT, "functions": functions, "tools": tools}).tools == tools
    search = [{"type": "web_search", "name": "search"}]
    assert conversation({"messages": CHAT, "tools": search}).tools == search
    with pytest.raises(ValueError, match="the columns 'tools' and 'functions' differ"):
        conversation({"messages": CHAT, "functions": functions, "tools": [{"name": "g"}]})
    with pytest.raises(ValueError, match="functions must be a list of mappings"):
        conversation({"messages": CHAT, "functions": {"name": "f"}})


def test_words_count_under_either_key_beside_either_role():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for role in ({"role": "assistant"}, {"from": "gpt"}):
        for words in ({"content": "Let me call"}, {"value": "Let me call"}, {"content": None, "value": "Let me call"}):
            turns = [CHAT[0], {**role, **words, "tool_calls": [call]}]
            assert conversation({"messages": turns}).messages[1]["content"] == "Let me call"


def test_the_keys_of_messages_are_those_that_hold_something():
    row = {"conversations": [{"from": "human", "value": "", "id": 1, "x": None}], "text": [{"y": 1}], "prompt": "a"}
    assert keys_of_messages(row) == {"from", "id"}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": ["user"], "content": "x"}, "unknown role"),
        ({"from": ["human"], "value": "x"}, "unknown role"),
        ({"role": "assistant", "content": "x", "tool_calls": 5}, "tool_calls must be a list, not int"),
        ({"role": "assistant", "content": "x", "tool_calls": [["f"]]}, "a tool call must be a mapping"),
        ({"role": "assistant", "content": "x", "tool_calls": ["f"]}, "a tool call: broken JSON"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "arguments: broken JSON"),
        (
            {"role": "assistant", "content": "x", "reasoning_content": {}},
            "reasoning_content must be a string, not dict",
        ),
        ({"role": "assistant", "content": "x", "thinking": ["y"]}, "thinking must be a string, not list"),
        ({"role": "user", "content": "x", "thinking": "y"}, "thinking beside the words of the user: only turns of the"),
        ({"role": "system", "content": "x", "reasoning_content": "y"}, "reasoning_content beside the words of the sys"),
        ({"from": "observation", "value": "x", "reasoning": "y"}, "reasoning beside the words of the tool"),
    ],
)
def test_wrong_types_are_named(message, reason):
    with pytest.raises(ValueError, match=rf"messages\[1\].*{reason}"):
        conversation({"messages": [CHAT[0], message]})


@pytest.mark.parametrize(
    ("key", "value", "weight"),
    [("weight", 2.5, 2.5), ("train", 0.5, 0.5), ("loss", 0.25, 0.25), ("loss_scale", 0.5, 0.5), ("train", True, 1)],
)
def test_every_name_of_a_weight_takes_fractions(key, value, weight):
    assert conversation({"messages": [CHAT[0], CHAT[1] | {key: value}]}).weights == [None, weight]


def test_loss_on_last_trains_the_last_answer_alone():
    assert conversation({"messages": CHAT + CHAT}).trained("last") == [0, 0, 0, 1]
    assert conversation({"messages": [*CHAT, CHAT[0], CHAT[1] | {"weight": 0.5}]}).trained("last") == [0, 0, 0, 0.5]
    assert conversation({"messages": [CHAT[0], CHAT[1] | {"weight": 1}, *CHAT]}).trained("last") == [0, 0, 0, 1]
    with pytest.raises(ValueError, match=r"messages\[1\]: weight 0.5 .*data\.loss_on=last does not train"):
        conversation({"messages": [CHAT[0], CHAT[1] | {"weight": 0.5}, *CHAT]}).trained("last")
    with pytest.raises(ValueError, match=r"messages\[0\]: weight 1 .*data\.loss_on=last does not train"):
        conversation({"messages": [CHAT[0] | {"weight": 1}, CHAT[1]]}).trained("last")


CALL = {"name": "f", "arguments": {"a": 1}}
TOOL_CALL = {"type": "function", "function": CALL}
CALLING = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}, {"role": "tool", "content": "r"}]


@pytest.mark.parametrize(
    "calling",
    [
        [{"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "r"}],
        [{"from": "function_call", "value": json.dumps([CALL])}, {"from": "tool", "value": "r"}],
        [{"from": "function_call", "value": CALL}, {"from": "observation", "value": "r"}],
        [{"role": "tool_call", "content": json.dumps(CALL)}, {"role": "tool_response", "content": "r"}],
        [
            {"role": "assistant", "content": None, "function_call": CALL, "tool_calls": []},
            {"role": "function", "content": "r", "function_call": None},
        ],
        [
            {"role": "assistant", "content": None, "tool_calls": json.dumps([TOOL_CALL])},
            {"role": "tool", "content": "r"},
        ],
        [
            {"role": "assistant", "content": None, "tool_calls": [json.dumps(TOOL_CALL)]},
            {"role": "tool", "content": "r"},
        ],
    ],
    ids=[
        "function_call",
        "list of calls",
        "call as a mapping",
        "ms-swift",
        "OpenAI's functions",
        "JSON",
        "JSON in a list",
    ],
)
def test_ways_to_write_a_tool_call(calling):
    found = conversation({"messages": [CHAT[0], *calling, CHAT[1]]}).messages
    for message, expected in zip(found, [*CALLING, CHAT[1]], strict=True):
        assert {key: value for key, value in message.items() if value or key == "content"} == expected


@pytest.mark.parametrize("as_mapping", [True, False])
def test_arguments_that_are_json_stay_text(as_mapping):
    call = CALL | {"arguments": '{"a": 1}'}
    turn = {"from": "function_call", "value": call if as_mapping else json.dumps(call)}
    found = conversation({"messages": [CHAT[0], turn, {"from": "observation", "value": "r"}, CHAT[1]]})
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    with pytest.raises(ValueError, match=r"messages\[1\]: a tool call's arguments: broken JSON"):
        broken = {"from": "function_call", "value": CALL | {"arguments": "{"}}
        conversation({"messages": [CHAT[0], broken, {"from": "observation", "value": "r"}, CHAT[1]]})


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"from": "function_call", "value": "f(1)"}, r"messages\[1\]: the function call: broken JSON"),
        ({"from": "function_call", "value": ""}, r"messages\[1\]: the function_call is empty"),
        ({"from": "function_call", "value": '"f"'}, r"messages\[1\]: a tool call must be a mapping|broken JSON"),
        ({"role": "assistant", "function_call": CALL, "tool_calls": [CALL]}, "tool_calls and a function_call"),
    ],
)
def test_calls_that_cannot_be_read_are_named(message, reason):
    with pytest.raises(ValueError, match=reason):
        conversation({"messages": [CHAT[0], message, {"from": "observation", "value": "r"}, CHAT[1]]})


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"name": "f", "arguments": [1]}, "arguments must be a mapping, not list"),
        ({"name": "f", "arguments": "3"}, "arguments must be a mapping, not int"),
        ({"name": "f", "parameters": {"a": 1}}, "has no `arguments`, but 'parameters'"),
    ],
)
def test_other_arguments_are_refused(call, reason):
    for each in (call, {"function": call}):
        with pytest.raises(ValueError, match=reason):
            conversation({"messages": [CHAT[0], {"role": "assistant", "tool_calls": [each]}]})


def test_a_system_column_is_the_first_message():
    system = {"role": "system", "content": "You are"}
    for row in (
        {"messages": CHAT, "system": "You are"},
        {"conversations": [{"from": "human", "value": "What"}, {"from": "gpt", "value": "Paris"}], "system": "You are"},
        {"messages": [system, *CHAT], "system": "You are"},
        {"prompt": CHAT[:1], "completion": CHAT[1:], "system": "You are"},
        {"prompt": "What", "completion": "Paris", "system": "You are"},
        {"instruction": "What", "output": "Paris", "system": "You are"},
    ):
        found = conversation(row)
        assert found.messages == [system, *CHAT]
        assert found.trained("assistant") == [0, 0, 1]
    assert question({"prompt": "What", "system": "You are"}).messages == [system, CHAT[0]]
    assert conversation({"messages": CHAT, "system": ""}).messages == CHAT
    with pytest.raises(ValueError, match=r"the column 'system' and messages\[0\] are two system messages"):
        conversation({"messages": [system, *CHAT], "system": "other"})
    with pytest.raises(ValueError, match="system must be a string, not list"):
        conversation({"messages": CHAT, "system": ["x"]})


TOOLS = [{"name": "f", "parameters": {"type": "object"}}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [CHAT[0] | {"weight": 0}, *CALLING[1:], CHAT[1] | {"weight": 0.5}], "tools": TOOLS},
        {"prompt": CALLING, "completion": CHAT[1:], "tools": TOOLS, "chat_template_kwargs": {"a": 1}},
        {"conversations": [{"from": "human", "value": "What"}, {"from": "gpt", "value": "[1]"}], "tools": TOOLS},
    ],
)
def test_columns_as_json_are_those_that_were_parsed(row):
    as_json = {column: json.dumps(value) for column, value in row.items()}
    assert conversation(as_json) == conversation(row)
    assert conversation(row | {"tools": list(map(json.dumps, TOOLS))}) == conversation(row)


def test_text_that_begins_like_json_stays_text():
    for prompt, completion in [("[1, 2]", '[{"a": 1}]'), ("[" * 10_000, "[]")]:
        found = conversation({"prompt": prompt, "completion": completion})
        assert [message["content"] for message in found.messages] == [prompt, completion]
    assert question({"prompt": json.dumps(CHAT[:1])}).messages == [{"role": "user", "content": json.dumps(CHAT[:1])}]
    with pytest.raises(ValueError, match="messages: broken JSON"):
        conversation({"messages": "[{"})
    for one_side in ({"prompt": json.dumps(CHAT[:1])}, {"completion": json.dumps(CHAT[1:])}):
        with pytest.raises(ValueError, match="both be strings or both be lists of messages"):
            conversation({"prompt": "q", "completion": "a"} | one_side)


def test_joined_turns_keep_the_bounds_of_prompt_and_completion():
    row = {"prompt": [CHAT[0], CHAT[0]], "completion": [CHAT[1], CHAT[1]]}
    found = conversation(row, merge=["turns"])
    assert [message["content"] for message in found.messages] == ["What\n\nWhat", "Paris\n\nParis"]
    assert found.first_trained == 1 and found.trained("assistant") == [0, 1]
    with pytest.raises(ValueError, match=r"messages\[1\]: wrong order.*data\.merge can join turns"):
        conversation(row)


def test_null_and_other_kinds_are_named():
    with pytest.raises(ValueError, match="the column 'prompt' is null"):
        conversation({"prompt": None, "completion": "b"})
    with pytest.raises(ValueError, match="a row of 'text' is not a conversation"):
        conversation({"text": "x"})


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"content": "Paris", "training": False}, r"messages\[1\]: training is not supported: give the whole message"),
        ({"content": "Paris", "loss_weight": 0}, "loss_weight is not supported"),
        ({"content": "Paris", "masked": True}, "masked is not supported"),
        ({"content": "Paris", "images": ["a.png"]}, "images is not supported: only text"),
        ({"content": "Paris", "value": "Rome"}, "content and value contradict each other"),
        ({"content": "Paris", "thinking": "a", "reasoning": "b"}, "thinking and reasoning contradict each other"),
    ],
)
def test_keys_of_a_message_that_would_change_what_is_trained_are_refused(message, fault):
    rows = [{"role": "user", "content": "q"}, {"role": "assistant", **message}]
    with pytest.raises(ValueError, match=fault):
        conversation({"messages": rows})


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_null_turn_of_other_roles_is_refused(role):
    rows = [{"role": role, "content": None}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match=f"the content of the {role}'s turn is null"):
        conversation({"messages": rows})
