"""Tools: Python functions that the model may call, in the format that Qwen and Hermes were taught.

    <tool_call>
    {"name": "calculator", "arguments": {"expression": "47 * 38"}}
    </tool_call>

A turn may hold several calls; a turn without one ends the conversation. The answers come back as messages of the role
`tool`, which the chat template writes. A call that cannot be read, or whose function raises, is counted and answered
with the error, so that the model can mend it.
"""

from __future__ import annotations

import ast
import inspect
import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import get_json_schema

from jaxtrain.rl.environments import Opening, Reply

# What an argument may cause, and the model can mend. Anything else is the environment's fault and costs the sample.
_MENDABLE = (ValueError, TypeError, ArithmeticError, LookupError, SyntaxError, OSError, RuntimeError)
_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|$)", re.DOTALL)


class ToolCall(NamedTuple):
    name: str
    arguments: Mapping[str, Any]


def tool_calls(text: str) -> list[ToolCall | ValueError]:
    """The calls of a turn in order; an error, with what is wrong, for one that cannot be read."""
    return [_read(body, end) for body, end in _CALL.findall(text)]


class Tools:
    """An environment of functions. Each needs type hints and a docstring in Google's style, as in transformers."""

    def __init__(self, *functions: Callable[..., Any]):
        self._functions = {function.__name__: function for function in functions}
        self._schemas = [get_json_schema(function) for function in functions]

    def reset(self, row: Mapping[str, Any]) -> Opening:
        prompt = row["prompt"]
        return Opening([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, self._schemas)

    def step(self, text: str) -> Reply:
        answers = [self._answer(call) for call in tool_calls(text)]
        messages = [{"role": "tool", "name": name, "content": content} for name, content, _ in answers]
        return Reply(messages, calls=len(answers), failures=sum(not ok for _, _, ok in answers))

    def _answer(self, call: ToolCall | ValueError) -> tuple[str, str, bool]:
        if isinstance(call, ValueError):
            return "unknown", f"error: {call}", False
        if call.name not in self._functions:
            return call.name, f"error: there is no tool {call.name!r}, only {', '.join(self._functions)}", False
        function = self._functions[call.name]
        try:
            inspect.signature(function).bind(**call.arguments)
            return call.name, str(function(**call.arguments)), True
        except _MENDABLE as error:
            return call.name, f"error: {error}", False


def calculator(expression: str) -> float | int:
    """
    Calculate an arithmetic expression.

    Args:
        expression: numbers, parentheses and the operators + - * / // % **
    """
    return _value(ast.parse(expression.strip(), mode="eval").body)


def calculator_tools() -> Tools:
    """An environment with one tool, `calculator`; the answer is rewarded by the run's reward functions."""
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
_MOST = 1e15  # of an operand of **: the model must not be able to fill the memory


def _value(node: ast.expr) -> float | int:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _value(left), _value(right)
            if isinstance(op, ast.Pow) and (abs(a) > _MOST or abs(b) > 64):
                raise ValueError("the power is too large")
            return _OPERATORS[type(op)](a, b)
    raise ValueError(f"{ast.unparse(node)} is no arithmetic")


def _read(body: str, end: str) -> ToolCall | ValueError:
    if not end:
        return ValueError("the call has no </tool_call>")
    try:
        call = json.loads(body)
    except json.JSONDecodeError as error:
        return ValueError(f"the call is not valid JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ValueError('a call is {"name": ..., "arguments": {...}}')
    arguments = call.get("arguments", {})
    return ToolCall(call["name"], arguments) if isinstance(arguments, dict) else ValueError("arguments are an object")
