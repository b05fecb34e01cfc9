"""Answers follow a schema, a regular expression or the format of tool calls, and echoes have log-probabilities."""

import json
import re

import pytest
from http_server import running, tiny_folder

from converters.tokenizer import CHATML
from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.sample.requests import EngineLimits
from jaxtrain.serve.served import load_served

pytest.importorskip("llguidance")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

TOOLS = "{% if tools %}{{ tools | tojson }} in <tool_call>{% endif %}"
REPLIES = "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}"
SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": [1, 20]}, "name": {"type": "string", "pattern": "^[a-c]{2,4}$"}},
    "required": ["size", "name"],
    "additionalProperties": False,
}
FUNCTION = {"type": "function", "function": {"name": "measure", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "measure"}}
HELLO = [{"role": "user", "content": "hello"}]
OPTIONS = {"model": "tiny", "messages": HELLO, "seed": 2**63 - 1}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("model"))
    made = load_served(folder, dtype="float32", max_length=768, slots=4, limits=EngineLimits(8, alternatives=2))
    made.tokenizer.chat_template = TOOLS + CHATML.replace("{% endfor %}", REPLIES + "{% endfor %}")
    return made._replace(chat=ChatTokenizer(made.tokenizer))


@pytest.fixture(scope="module")
def address(served):
    with running(served) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"http://{address.host}:{address.port}/v1", api_key="none", max_retries=0)


def fits(value):
    return value["size"] in (1, 20) and re.fullmatch("[a-c]{2,4}", value["name"]) and len(value) == 2


def test_an_answer_follows_a_schema_whole_and_streamed(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "size", "schema": SCHEMA, "strict": True}}
    reply = client.chat.completions.create(**OPTIONS, response_format=wanted, n=3, logprobs=True)
    assert all(fits(json.loads(choice.message.content)) for choice in reply.choices)
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}
    pieces = client.chat.completions.create(**OPTIONS, response_format=wanted, stream=True)
    assert "".join(each.choices[0].delta.content for each in pieces) == reply.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_tool_call_is_required(client, choice, stream):
    tools = [FUNCTION] if choice == "required" else [OTHER, FUNCTION]
    reply = client.chat.completions.create(**OPTIONS, tools=tools, tool_choice=choice, stream=stream)
    choices = [piece.choices[0] for piece in reply] if stream else reply.choices
    calls = [each for one in choices for each in (one.delta if stream else one.message).tool_calls or []]
    assert [each.function.name for each in calls] == ["measure"] and calls[0].id.startswith("call_")
    assert fits(json.loads(calls[0].function.arguments)) and choices[-1].finish_reason == "tool_calls"
    answered = [
        *HELLO,
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "type": "function", "function": calls[0].function.model_dump()}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "5"},
    ]
    assert client.chat.completions.create(**OPTIONS | {"messages": answered}, tools=tools, max_tokens=2).choices


@pytest.mark.parametrize(
    ("options", "field", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            {"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "no tool",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "must match pattern"),
        ({"response_format": {"type": "regex", "pattern": "("}}, "response_format", "unclosed group"),
        ({"response_format": {"type": "yaml"}}, "response_format", "must have one of the types"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}},
            "response_format",
            "Invalid type: x",
        ),
        ({"response_format": {"type": "json_object"}, "extra_body": {"min_tokens": 3}}, "min_tokens", "must be 0"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(client, options, field, message):
    with pytest.raises(openai.BadRequestError, match=message) as error:
        client.chat.completions.create(**OPTIONS, **options)
    assert error.value.param == field


def test_an_echo_has_the_log_probabilities_that_its_tokens_were_generated_with(client, served):
    """Also of several prompts, with alternatives, and without new tokens."""
    prompts = ["abc", "d e"]
    letters = {str(token): 1000 for token in served.tokenizer.encode("abcdefgh")}
    options = {"model": "tiny", "temperature": 0, "logprobs": 2, "logit_bias": letters}
    generated = client.completions.create(prompt=prompts, max_tokens=6, echo=True, **options).choices
    assert [each.text.startswith(prompt) for each, prompt in zip(generated, prompts, strict=True)] == [True, True]
    for prompt, choice in zip(prompts, generated, strict=True):
        told = choice.logprobs
        ids = served.tokenizer.encode(prompt)
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == len(ids) + 6
        new = served.tokenizer.encode(choice.text[len(prompt) :])
        again = client.completions.create(prompt=ids + new, max_tokens=0, echo=True, **options)
        scored = again.choices[0].logprobs
        assert again.choices[0].finish_reason == "length" and again.usage.completion_tokens == 0
        assert scored.token_logprobs[1:] == pytest.approx(told.token_logprobs[1:], abs=1e-4)
        assert scored.tokens == told.tokens and scored.text_offset == told.text_offset


def test_a_streamed_echo_begins_with_the_prompt(client):
    options = {"model": "tiny", "prompt": ["ab", "c"], "n": 2, "max_tokens": 5, "temperature": 0, "echo": True}
    whole = client.completions.create(**options, logprobs=1).choices
    texts, offsets = [""] * 4, [[] for _ in range(4)]
    for piece in client.completions.create(**options, logprobs=1, stream=True):
        choice = piece.choices[0]
        texts[choice.index] += choice.text
        offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [each.text for each in whole] and offsets == [each.logprobs.text_offset for each in whole]
    assert [text[:1] for text in texts] == ["a", "a", "c", "c"]
