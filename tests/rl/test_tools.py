import asyncio
import threading

import numpy as np
import pytest
from chat_templates import QWEN25, tokenizer

from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.data.formats import Encoder
from jaxtrain.rl.deadlines import call_all
from jaxtrain.rl.environments import checked_opening, checked_reply
from jaxtrain.rl.tools import ToolCall, Tools, calculator, calculator_tools, tool_calls


def call(text):
    return f"<tool_call>\n{text}\n</tool_call>"


GOOD = call('{"name": "calculator", "arguments": {"expression": "47 * 38"}}')


def test_calls_are_read_in_order_and_faults_are_kept_in_their_place():
    bad = call('{"name": "calculator", "arguments": ')
    calls = tool_calls(f"I think{bad}{GOOD} and <tool_call>" + '{"name": "x"}')
    assert calls[1] == ToolCall("calculator", {"expression": "47 * 38"})
    assert "not valid JSON" in str(calls[0]) and "no </tool_call>" in str(calls[2])
    assert tool_calls("no call") == []


@pytest.mark.parametrize("body", ["[1]", '{"arguments": {}}', '{"name": "calculator", "arguments": [1]}'])
def test_json_that_is_no_call_is_an_error(body):
    assert isinstance(tool_calls(call(body))[0], ValueError)


def test_a_turn_with_calls_is_answered_and_one_without_ends():
    tools = calculator_tools()
    opening = tools.reset({"prompt": "What is 47 * 38?"})
    assert opening.messages == [{"role": "user", "content": "What is 47 * 38?"}]
    (schema,) = opening.tools
    assert schema["function"]["name"] == "calculator" and "expression" in schema["function"]["parameters"]["properties"]
    reply = tools.step(GOOD)
    assert reply.messages == [{"role": "tool", "name": "calculator", "content": "1786"}]
    assert (reply.calls, reply.failures) == (1, 0)
    assert tools.step("It is 1786.").messages == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"name": "calculater", "arguments": {}}', "unknown tool 'calculater'; available tools: calculator"),
        ('{"name": "calculator", "arguments": {"expr": "1"}}', "missing a required argument: 'expression'"),
        ('{"name": "calculator", "arguments": {"expression": "1 / 0"}}', "division by zero"),
        ('{"name": "calculator", "arguments": {"expression": "1 +"}}', "invalid syntax"),
        ('{"name": "calculator", "arguments": {"expression": "__import__(\'os\')"}}', "is not arithmetic"),
        ('{"name": "calculator", "arguments": {"expression": "9 ** 9 ** 9"}}', "too large"),
    ],
)
def test_a_failing_call_returns_the_error_and_is_counted(body, said):
    reply = calculator_tools().step(call(body))
    assert said in reply.messages[0]["content"] and reply.messages[0]["content"].startswith("error: ")
    assert (reply.calls, reply.failures) == (1, 1)


def test_the_calculator_calculates():
    assert calculator("(1 + 2) * -3 / 4") == -2.25
    assert calculator("2 ** 10 // 7 % 5") == 1


def test_several_functions_are_distinguished():
    def twice(text: str) -> str:
        """
        Say it twice.

        Args:
            text: what to say
        """
        return text * 2

    reply = Tools(calculator, twice).step(GOOD + call('{"name": "twice", "arguments": {"text": "ab"}}'))
    assert [message["content"] for message in reply.messages] == ["1786", "abab"]


def test_any_model_text_gets_a_response_and_loses_no_sample():
    """Includes errors other than JSONDecodeError and ValueError."""
    bodies = {
        "[" * 100_000: "not valid JSON",
        '{"name": "calculator", "arguments": {"expression": ' + "9" * 5000 + "}}": "not valid JSON",
        '{"name": "calculator", "arguments": {"expression": 5}}': "no attribute 'strip'",
        '{"name": "calculator", "arguments": {"expression": "' + "-" * 100_000 + '1"}}': "nested too deeply",
        '{"name": "calculator", "arguments": {"expression": "' + "(" * 5000 + '1"}}': "too many nested parentheses",
        '{"name": "\\udc00", "arguments": {}}': "unknown tool '\\udc00'",
    }
    for body, expected in bodies.items():
        reply = checked_reply(calculator_tools().step(call(body)))
        assert expected in reply.messages[0]["content"] and (reply.calls, reply.failures) == (1, 1)


def test_async_tools_are_awaited_and_any_exception_is_an_answer():
    class Missing(Exception):
        pass

    async def population(city: str) -> int:
        """
        How many people live in a city.

        Args:
            city: its name
        """
        await asyncio.sleep(0.001)
        if city != "Paris":
            raise Missing
        return 2_048_472

    reply = Tools(population).step(
        call('{"name": "population", "arguments": {"city": "Paris"}}')
        + call('{"name": "population", "arguments": {"city": "\\udc00"}}')
    )
    assert [message["content"] for message in reply.messages] == ["2048472", "error: Missing"]
    assert (reply.calls, reply.failures) == (2, 1)


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError


def misbehaving(over):
    def leaves() -> str:
        """
        Leave.
        """
        raise SystemExit("no further")

    def unreadable() -> str:
        """
        Raise an error without a message.
        """
        raise Unreadable

    def hangs() -> str:
        """
        Hang.
        """
        return str(over.wait())

    return Tools(leaves, unreadable, hangs, calculator)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("leaves", "error: no further"),
        ("unreadable", "error: (its message cannot be read: RuntimeError)"),
        ("hangs", "error: took longer than"),
    ],
)
def test_whatever_a_tool_does_the_model_is_answered_in_time(name, said):
    """Within the environment's limit, here 2 seconds."""
    over = threading.Event()
    tools = misbehaving(over)
    (reply,) = call_all([lambda: tools.step(call(f'{{"name": "{name}", "arguments": {{}}}}') + GOOD)], 2.0)
    over.set()
    assert not isinstance(reply, BaseException), reply
    failed, good = (message["content"] for message in reply.messages)
    assert failed.startswith(said) and good == "1786"
    assert (reply.calls, reply.failures) == (2, 1)


def test_an_error_that_quotes_a_long_text_is_short():
    body = '{"name": "calculator", "arguments": {"expression": "' + "[" + "1, " * 2000 + ']"}}'
    (message,) = calculator_tools().step(call(body)).messages
    assert len(message["content"]) < 600
    assert message["content"].startswith("error: [1, 1, ") and message["content"].endswith("is not arithmetic")


def test_tools_must_have_unique_names():
    with pytest.raises(ValueError, match="tools must have unique names: calculator, calculator"):
        Tools(calculator, calculator)


def test_a_prompt_in_parts_and_arguments_as_json_are_read_as_in_training():
    arguments = '{"expression": "1 + 1"}'
    called = [{"type": "function", "function": {"name": "calculator", "arguments": arguments}}]
    prompt = [
        {"role": "user", "content": [{"type": "text", "text": "What is 1 + 1?"}]},
        {"role": "assistant", "content": "", "tool_calls": called},
        {"role": "tool", "name": "calculator", "content": "2"},
    ]
    messages = list(checked_opening(calculator_tools().reset({"prompt": prompt})).messages)
    assert messages[0]["content"] == "What is 1 + 1?"
    tok = tokenizer(QWEN25)
    ids = ChatTokenizer(tok).prompt(messages)
    np.testing.assert_array_equal(ids, Encoder(tok).question({"prompt": prompt})[0])
    assert '{"name": "calculator", "arguments": {"expression": "1 + 1"}}' in tok.decode(ids)
