"""Limits on what rendering a chat template may cost.

A template comes with a downloaded model. jinja's sandbox keeps it from running other code, but not from using all time
and memory. Here every value that a template can make larger is checked: by operators, calls and filters, and when it is
written. Rounds of loops and calls of macros are counted. The limits are far above what a conversation needs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import str_join
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 1_000_000  # rounds of loops and calls of macros
MAX_SECONDS = 30.0  # of the thread's CPU time, so that a busy machine refuses nothing
MAX_LENGTH = 1 << 24  # characters of a text, items of a list, digits of a number
_STEPS_PER_CLOCK = 1000  # the clock is read once in so many steps

BUDGET = "_jaxtrain_budget"  # the variable of the rendering's `Budget`
# Names of filters.
_WRITTEN, _JOINED, _SUM, _STEP = "_jaxtrain_written", "_jaxtrain_joined", "_jaxtrain_sum", "_jaxtrain_step"
_MAX_WIDTH = 100_000  # of a field, a precision or a number of groups
_WIDTH = re.compile(r"\d{6,}")  # in a format
_NESTED_FIELD = re.compile(r"\{[^{}]*\{")  # a width that is an argument
_OPERATORS = frozenset({"*", "**", "%"})  # those of which jinja hands each to `call_binop`
_MAX_SUMMANDS = 32  # of a sum that is checked once
_WITH_WIDTHS = ("center", "batch", "slice", "round")  # filters
_TEXT_OF_VALUES = ("string", "pprint")  # filters
_UNCHECKED = "_jaxtrain_unchecked_"  # before the name of a filter: that filter without its check


@dataclass(eq=False)
class Budget:
    """What one rendering has used."""

    steps: int = 0  # rounds of loops and calls of macros
    written: int = 0  # characters, also those of blocks and macros
    start: float | None = None  # by the thread's clock of CPU time, when it was first read
    sizes: dict[int, tuple[Any, int]] = field(default_factory=dict)  # by id: a container, which is kept alive, and its

    def size(self, value: Any) -> int:
        """About how many characters `value` has as text. A list within itself many times is that long, though it takes
        little memory. Raises SecurityError beyond the limit."""
        if isinstance(value, str | bytes):
            return len(value)
        if isinstance(value, Namespace):
            value = value._Namespace__attrs  # what its repr shows
        if not isinstance(value, Collection):
            return 1
        if id(value) not in self.sizes:
            inner: Iterable[Any] = (*value.keys(), *value.values()) if isinstance(value, dict) else value
            found = len(value) + sum(map(self.size, inner))
            _check_length(found)
            self.sizes[id(value)] = value, found
        return self.sizes[id(value)][1]


def limit_environment(environment: SandboxedEnvironment) -> None:
    """Set the checks of operators, calls and filters in the environment of one template, before it is compiled."""
    operate, call = environment.call_binop, environment.call

    def call_binop(context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        _check_operands(context[BUDGET], operator, left, right)
        return operate(context, operator, left, right)

    def checked_call(context: jinja2.runtime.Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        # The sandbox wraps str.format, and hands other methods out as they are.
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(owner, str):
            args = tuple(list(each) if hasattr(each, "__next__") else each for each in args)
            _check_method(function.__name__, context[BUDGET], owner, *args, *kwargs.values())
        return call(context, function, *args, **kwargs)

    environment.intercepted_binops = _OPERATORS
    vars(environment).update(call_binop=call_binop, call=checked_call)
    environment.globals.pop("lipsum", None)
    filters = environment.filters
    checks: dict[str, Callable[..., None]] = {
        **dict.fromkeys(_WITH_WIDTHS, _check_widths),
        **dict.fromkeys(("indent", "wordwrap", "tojson"), _check_multiplied),
        **dict.fromkeys(_TEXT_OF_VALUES, _check_sizes),
        "replace": partial(_check_method, "replace"),
        "format": partial(_check_method, "%"),
        "join": _check_joined,
        "sum": _check_numbers,
    }
    for name, check in checks.items():
        filters[f"{_UNCHECKED}{name}"], filters[name] = filters[name], _checked(name, check)
    filters |= {_WRITTEN: _written, _JOINED: _joined, _SUM: _checked_sum, _STEP: _step}


def limit_tree(tree: nodes.Template) -> None:
    """Set the checks of what is written and joined, and the counts of loops and macros, in the tree of a template."""
    for node in list(tree.find_all((nodes.Output, nodes.For, nodes.Macro, nodes.CallBlock))):
        if isinstance(node, nodes.Output):
            written = (each if isinstance(each, nodes.TemplateData) else _filter(each, _WRITTEN) for each in node.nodes)
            node.nodes = list(written)
        else:
            counted = nodes.ExprStmt(_filter(nodes.Const(None), _STEP))
            node.body.insert(0, counted.set_lineno(node.lineno))
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for name, value in parent.iter_fields():
            if isinstance(value, list):
                value[:] = [_limited(each, parent) for each in value]
            else:
                setattr(parent, name, _limited(value, parent))


def _limited(value: Any, parent: nodes.Node) -> Any:
    """Filters for what jinja does not hand to `call_binop`: a list that is joined for `a ~ b`, and a check of sums, for
    which a call at every `+` would take long."""
    if isinstance(value, nodes.Concat):
        return _filter(nodes.List(value.nodes), _JOINED)
    if not isinstance(value, nodes.Add) or (isinstance(parent, nodes.Add) and value is parent.left):
        return value
    sums = [value]
    while isinstance(left := sums[-1].left, nodes.Add):
        sums.append(left)
    for each in sums[_MAX_SUMMANDS::_MAX_SUMMANDS]:
        each.left = _filter(each.left, _SUM)
    written = isinstance(parent, nodes.Filter) and parent.name == _WRITTEN
    return value if written else _filter(value, _SUM)


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    found = nodes.Filter(node, name, [], [], None, None)
    found.set_lineno(node.lineno)
    return found


@jinja2.pass_context
def _step(context: jinja2.runtime.Context, _: None) -> None:
    budget: Budget = context[BUDGET]
    budget.steps += 1
    if budget.steps > MAX_STEPS:
        raise SecurityError(f"it loops more than {MAX_STEPS:,} times")
    if budget.steps % _STEPS_PER_CLOCK == 0:
        now = time.thread_time()
        budget.start = now if budget.start is None else budget.start
        if now - budget.start > MAX_SECONDS:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")


@jinja2.pass_context
def _written(context: jinja2.runtime.Context, value: Any) -> Any:
    budget: Budget = context[BUDGET]
    budget.written += len(value) if isinstance(value, str) else budget.size(value)
    if budget.written > MAX_LENGTH:  # a call of the check for everything that is written would take long
        _check_length(budget.written)
    return value


@jinja2.pass_context
def _joined(context: jinja2.runtime.Context, values: list[Any]) -> str:
    size = context[BUDGET].size
    _check_length(sum(len(value) if isinstance(value, str) else size(value) for value in values))
    return str_join(values)


def _checked_sum(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        _check_length(len(value))
    return value


def _checked(name: str, check: Callable[..., None]) -> Callable[..., Any]:
    """The filter of that name behind a check of its arguments."""

    @jinja2.pass_context
    def checked(context: jinja2.runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(value, "__next__"):
            value = list(value)
        check(context[BUDGET], value, *args, *kwargs.values())
        return context.environment.call_filter(f"{_UNCHECKED}{name}", value, args, kwargs, context)

    return checked


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise SecurityError(f"it makes values of more than {MAX_LENGTH:,} characters")


def _check_sizes(budget: Budget, *values: Any) -> None:
    _check_length(sum(map(budget.size, values)))


def _check_widths(budget: Budget, value: Any, *args: Any) -> None:
    _check_sizes(budget, value, *args)
    if any(isinstance(each, int | float) and each > _MAX_WIDTH for each in args):
        raise SecurityError(f"it asks for a width of more than {_MAX_WIDTH:,}")


def _check_multiplied(budget: Budget, value: Any, *args: Any) -> None:
    """Of filters that may add an argument, or so many blanks, to every part of a value."""
    _check_widths(budget, value, *args)
    added = sum(each if isinstance(each, int) else budget.size(each) for each in args)
    _check_length(budget.size(value) * (1 + added))


def _check_numbers(budget: Budget, values: Any, *args: Any) -> None:
    if any(isinstance(each, list | tuple) for each in args):
        raise SecurityError("it adds lists with the filter sum")
    _check_sizes(budget, values)


def _check_method(name: str, budget: Budget, text: str, *args: Any) -> None:
    """Of a method of str, or of the operator %, whose result may be longer than its arguments."""
    sizes = [budget.size(each) for each in args]
    if name == "join":
        _check_joined(budget, *args, text)
    elif name == "replace" and len(args) >= 2 and isinstance(args[0], str):
        _check_length(len(text) + (text.count(args[0])) * sizes[1])
    elif name == "translate":
        _check_length(len(text) * max(sizes, default=1))
    elif name in ("format", "format_map", "%"):
        if _WIDTH.search(text) or ("*" in text if name == "%" else _NESTED_FIELD.search(text)):
            raise SecurityError("it formats with a width that is an argument or too large")
        _check_length(len(text) + text.count("%" if name == "%" else "{") * sum(sizes))
    elif name in ("center", "ljust", "rjust", "zfill"):
        _check_widths(budget, text, *args)
    elif name == "expandtabs":
        _check_length(len(text) * max((each for each in args if isinstance(each, int)), default=8))


def _check_joined(budget: Budget, values: Any, between: Any = "", *_: Any) -> None:
    count = len(values) if hasattr(values, "__len__") else 1
    _check_length(budget.size(values) + budget.size(between) * count)


def _check_operands(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Of an operator whose result may be larger than its operands."""
    if operator == "%" and isinstance(left, str):
        _check_method("%", budget, left, *(right if isinstance(right, tuple) else (right,)))
    elif operator == "*":
        texts = [each for each in (left, right) if isinstance(each, str | list | tuple)]
        numbers = [each for each in (left, right) if isinstance(each, int)]
        if texts and numbers:
            _check_length(len(texts[0]) * max(numbers[0], 0))
        elif len(numbers) == 2:
            _check_length(sum(number.bit_length() for number in numbers))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_length(left.bit_length() * abs(right))
