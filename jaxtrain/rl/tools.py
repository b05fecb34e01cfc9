"""Tools: Python functions that the model may call, in the format of Qwen and Hermes.

    <tool_call>
    {"name": "calculator", "arguments": {"expression": "47 * 38"}}
    </tool_call>

A turn may have several calls; a turn without a call ends the conversation. Results are messages of the role `tool`,
which the chat template must support. A call that cannot be parsed, or whose function raises or takes too long, counts
as a failure; its result is the error, so that the model can correct it.
"""

import ast
import inspect
import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import get_json_schema

from jaxtrain.data.messages import question
from jaxtrain.rl.deadlines import awaited, call_all, error_text, time_left
from jaxtrain.rl.environments import Opening, Reply

_SHARE_OF_TIME = 0.9  # of what is left of the environment's limit: a call may take so long and still be answered
_MAX_ERROR = 500  # characters: an error may quote all that the model wrote, and the answer must leave it room
_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|$)", re.DOTALL)


class ToolCall(NamedTuple):
    name: str
    arguments: Mapping[str, Any]


def tool_calls(text: str) -> list[ToolCall | ValueError]:
    """The calls of a turn in order; a ValueError in place of a call that cannot be parsed."""
    return [_parse(body, end) for body, end in _CALL.findall(text)]


class Tools:
    """An environment of functions. Each must have type hints and a Google-style docstring, as in transformers.

    The functions may be `async`.
    """

    def __init__(self, *functions: Callable[..., Any]):
        """Raises ValueError for two functions with the same name."""
        self._functions = {function.__name__: function for function in functions}
        if len(self._functions) < len(functions):
            raise ValueError(f"tools must have unique names: {', '.join(function.__name__ for function in functions)}")
        self._schemas = [get_json_schema(function) for function in functions]

    def reset(self, row: Mapping[str, Any]) -> Opening:
        return Opening(question(dict(row)).messages, self._schemas)

    def step(self, text: str) -> Reply:
        results = [self._call(call) for call in tool_calls(text)]
        messages = [{"role": "tool", "name": name, "content": _text(content)} for name, content, _ in results]
        return Reply(messages, calls=len(results), failures=sum(not ok for _, _, ok in results))

    def _call(self, call: ToolCall | ValueError) -> tuple[str, str, bool]:
        """Name, result and whether the call succeeded."""
        if isinstance(call, ValueError):
            return "unknown", f"error: {_shortened(str(call))}", False
        if call.name not in self._functions:
            known = ", ".join(self._functions)
            return _text(call.name), f"error: unknown tool {_shortened(call.name)!r}; available tools: {known}", False
        function = self._functions[call.name]

        def run() -> str:
            inspect.signature(function).bind(**call.arguments)
            return str(awaited(function(**call.arguments)))

        (result,) = call_all([run], round(_SHARE_OF_TIME * time_left(), 2))
        if isinstance(result, BaseException):  # any: a function may also call `exit`
            return call.name, f"error: {_shortened(error_text(result) or type(result).__name__)}", False
        return call.name, result, True


def _shortened(text: str) -> str:
    half = _MAX_ERROR // 2
    return text if len(text) <= _MAX_ERROR else f"{text[:half]} ... {text[-half:]}"


def _text(text: str) -> str:
    """`text` with escapes for characters without a UTF-8 encoding: a model may write half of a surrogate pair."""
    return text.encode(errors="backslashreplace").decode()


def calculator(expression: str) -> float | int:
    """
    Calculate an arithmetic expression.

    Args:
        expression: numbers, parentheses and the operators + - * / // % **
    """
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (RecursionError, MemoryError):  # MemoryError is what the parser raises for deep nesting
        raise ValueError("the expression is nested too deeply") from None


def calculator_tools() -> Tools:
    """An environment with one tool, `calculator`; the run's reward functions score the answer."""
    return Tools(calculator)


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_MAX_BASE, _MAX_EXPONENT = 1e15, 64  # of **: the model must not be able to exhaust the memory


def _value(node: ast.expr) -> float | int:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _value(left), _value(right)
            if isinstance(op, ast.Pow) and (abs(a) > _MAX_BASE or abs(b) > _MAX_EXPONENT):
                raise ValueError("the power is too large")
            return _OPERATORS[type(op)](a, b)
    raise ValueError(f"{ast.unparse(node)} is not arithmetic")


def _parse(body: str, end: str) -> ToolCall | ValueError:
    if not end:
        return ValueError("the call has no </tool_call>")
    try:
        call = json.loads(body)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of more digits than Python converts
        return ValueError(f"the call is not valid JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ValueError('a call must be {"name": ..., "arguments": {...}}')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return ValueError("arguments must be an object")
    return ToolCall(call["name"], arguments)
