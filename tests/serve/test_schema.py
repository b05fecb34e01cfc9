"""The bodies of calls."""

from dataclasses import fields

import pytest

from jaxtrain.sample.requests import SamplingParams
from jaxtrain.serve.schema import OTHERWISE, ChatCall, CompletionCall


def test_every_sampling_parameter_is_a_field_or_has_a_reason_not_to_be():
    parameters = {field.name for field in fields(SamplingParams)}
    assert parameters - CompletionCall.model_fields.keys() <= OTHERWISE.keys() <= parameters


@pytest.mark.parametrize(
    ("given", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_are_a_list(given, expected):
    assert CompletionCall.model_validate({"prompt": given}).prompt == expected


def test_a_template_gets_text_and_arguments_as_objects():
    function = {"name": "f", "arguments": '{"a": 1}'}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": function}]},
    ]
    user, called = (each.for_template() for each in ChatCall.model_validate({"messages": messages}).messages)
    assert user == {"role": "user", "content": "ab", "name": "x"}
    (call,) = called["tool_calls"]
    assert call == {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    for arguments in ("[1]", "{"):
        messages[1]["tool_calls"][0]["function"]["arguments"] = arguments
        with pytest.raises(ValueError):
            ChatCall.model_validate({"messages": messages}).messages[1].for_template()
