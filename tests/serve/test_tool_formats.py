"""Content and tool calls are the same however a text is cut into pieces."""

import json

import pytest

from jaxtrain.serve.outputs import CalledTool, Parts, Splitter, parser
from jaxtrain.serve.tool_formats import HARMONY, HERMES, LLAMA, MISTRAL, parse_harmony, tool_format

ARGUMENTS = {"city": "Paris {}", "days": [1, 2]}
BODY = json.dumps({"name": "weather", "arguments": ARGUMENTS})
PARAMETERS = json.dumps({"name": "weather", "parameters": ARGUMENTS})
WEATHER = CalledTool("weather", json.dumps(ARGUMENTS))
NAMED = json.dumps(ARGUMENTS)

HERMES_PARSER = parser("", HERMES.read)
LLAMA_PARSER, MISTRAL_PARSER = parser("", LLAMA.read), parser("", MISTRAL.read)

CASES = [
    (HERMES_PARSER, "no call", Parts("", "no call", [])),
    (HERMES_PARSER, "a < b <tool", Parts("", "a < b <tool", [])),
    (HERMES_PARSER, f"Let us see.\n<tool_call>\n{BODY}\n</tool_call>", Parts("", "Let us see.", [WEATHER])),
    (HERMES_PARSER, f"<tool_call>{BODY}</tool_call>\n" * 2, Parts("", "", [WEATHER, WEATHER])),
    (HERMES_PARSER, f"<think>x</think><tool_call>{BODY}", Parts("x", "", [WEATHER])),
    (HERMES_PARSER, "<tool_call>{</tool_call> b", Parts("", "<tool_call>{</tool_call> b", [])),
    (LLAMA_PARSER, PARAMETERS, Parts("", "", [WEATHER])),
    (LLAMA_PARSER, f"<|python_tag|>{PARAMETERS}; {PARAMETERS}", Parts("", "", [WEATHER, WEATHER])),
    (LLAMA_PARSER, "hello", Parts("", "hello", [])),
    (LLAMA_PARSER, f"{PARAMETERS} and more", Parts("", f"{PARAMETERS} and more", [])),
    (LLAMA_PARSER, '{"a": 1}', Parts("", '{"a": 1}', [])),
    (MISTRAL_PARSER, "hello [", Parts("", "hello [", [])),
    (MISTRAL_PARSER, f"Well. [TOOL_CALLS] [{BODY}, {BODY}]", Parts("", "Well.", [WEATHER, WEATHER])),
    (MISTRAL_PARSER, f"[TOOL_CALLS]weather[ARGS]{NAMED}" * 2, Parts("", "", [WEATHER, WEATHER])),
    (MISTRAL_PARSER, "[TOOL_CALLS]weather[ARGS]{", Parts("", "[TOOL_CALLS]weather[ARGS]{", [])),
    (
        parse_harmony,
        "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>final<|message|>hi",
        Parts("think", "hi", []),
    ),
    (
        parse_harmony,
        f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{NAMED}",
        Parts("", "", [WEATHER]),
    ),
    (parse_harmony, "<|channel|>commentary to=functions.weather<|message|>{", Parts("", "{", [])),
]


@pytest.mark.parametrize(("parse", "text", "expected"), CASES)
def test_a_text_is_split_into_its_parts_at_once_and_in_pieces(parse, text, expected):
    assert parse(text, True) == expected
    for size in (1, 2, 7):
        splitter = Splitter(parse)
        pieces = [splitter.feed(text[at : at + size], False) for at in range(0, len(text), size)]
        pieces.append(splitter.feed("", True))
        reasoning, content, calls = zip(*pieces, strict=True)
        assert Parts("".join(reasoning), "".join(content), [call for each in calls for call in each]) == expected
        assert splitter.called == len(expected.calls)


def test_content_is_streamed_before_the_end():
    for parse in (HERMES_PARSER, LLAMA_PARSER, MISTRAL_PARSER):
        assert Splitter(parse).feed("hello there", False).content == "hello there"


def test_the_format_is_that_of_the_chat_template():
    assert tool_format("{{ '<tool_call>' }}") is HERMES and tool_format("[TOOL_CALLS]") is MISTRAL
    assert tool_format("<|python_tag|>") is LLAMA and tool_format("<|channel|><tool_call>") is HARMONY
    assert tool_format("{{ messages }}") is None and tool_format(None) is None
