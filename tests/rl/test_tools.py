import pytest

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
        ('{"name": "calculater", "arguments": {}}', "no tool 'calculater', only calculator"),
        ('{"name": "calculator", "arguments": {"expr": "1"}}', "missing a required argument: 'expression'"),
        ('{"name": "calculator", "arguments": {"expression": "1 / 0"}}', "division by zero"),
        ('{"name": "calculator", "arguments": {"expression": "1 +"}}', "invalid syntax"),
        ('{"name": "calculator", "arguments": {"expression": "__import__(\'os\')"}}', "is no arithmetic"),
        ('{"name": "calculator", "arguments": {"expression": "9 ** 9 ** 9"}}', "too large"),
    ],
)
def test_a_call_that_fails_is_answered_with_why_and_counted(body, said):
    reply = calculator_tools().step(call(body))
    assert said in reply.messages[0]["content"] and reply.messages[0]["content"].startswith("error: ")
    assert (reply.calls, reply.failures) == (1, 1)


def test_the_calculator_calculates():
    assert calculator("(1 + 2) * -3 / 4") == -2.25
    assert calculator("2 ** 10 // 7 % 5") == 1


def test_several_functions_are_told_apart():
    def twice(text: str) -> str:
        """
        Say it twice.

        Args:
            text: what to say
        """
        return text * 2

    reply = Tools(calculator, twice).step(GOOD + call('{"name": "twice", "arguments": {"text": "ab"}}'))
    assert [message["content"] for message in reply.messages] == ["1786", "abab"]
