"""Where a chat template writes each message: its loops and `{% generation %}` marks, traced while it renders.

The template's syntax tree gets a statement at the head of every loop over one name and around every generation mark.
The statements write nothing and note how many characters have been written.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.sandbox import SandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from jaxtrain.data.template_limits import BUDGET, Budget, limit_environment, limit_tree

Message = dict[str, Any]
TextSpan = tuple[int, int]  # [start, end) in the characters of the rendered text

_TRACE = "_jaxtrain_trace"  # of the variable that holds the function which takes notes, and of the filter that calls it


class Event(NamedTuple):
    kind: str  # "turn": a loop comes to `value`; "end": that loop is over; "open", "close": of a {% generation %}
    loop: int
    value: Any
    at: int  # characters written so far


@dataclass(frozen=True)
class Trace:
    text: str
    events: list[Event]
    turns: list[int | None]  # of each event: the number of the message whose turn it is

    @cached_property
    def generated(self) -> list[tuple[int | None, TextSpan]]:
        """The spans in `{% generation %}` marks and the numbers of their messages; None outside of a loop over them."""
        marks = self._at("open", "close")
        pairs = zip(marks[::2], marks[1::2], strict=True)
        return [(turn, (start, end)) for (start, turn), (end, _) in pairs if start < end]

    @cached_property
    def blocks(self) -> dict[int, TextSpan]:
        """What the template's loops wrote for each message; without messages for which that is not one run of text."""
        runs: list[tuple[int | None, TextSpan]] = []
        for (start, turn), (end, _) in pairwise([*self._at("turn", "end"), (len(self.text), None)]):
            if runs and runs[-1][0] == turn:
                runs[-1] = turn, (runs[-1][1][0], end)
            elif start < end:
                runs.append((turn, (start, end)))
        found = [(turn, span) for turn, span in runs if turn is not None and self.text[slice(*span)].strip()]
        count = Counter(turn for turn, _ in found)
        return {turn: span for turn, span in found if count[turn] == 1}

    def after_messages(self) -> str:
        """What the template writes after its last loop over the messages: a prompt for the assistant, where it asks."""
        ends = [at for at, turn in self._at("end") if turn is None]
        return self.text[ends[-1] :] if ends else ""

    def _at(self, *kinds: str) -> list[tuple[int, int | None]]:
        noted = zip(self.events, self.turns, strict=True)
        return [(event.at, turn) for event, turn in noted if event.kind in kinds]


def trace(template: str, messages: list[Message], variables: dict[str, Any]) -> Trace:
    """Render `messages` with `variables` and note where each message is written.

    Raises ValueError where the template refuses the conversation.
    """
    written, pieces, events, turns = 0, [], [], []
    messages = [dict(message) for message in messages]  # distinguished by identity, so each must be a separate object
    numbers = {id(message): number for number, message in enumerate(messages)}
    speaking: dict[int, int] = {}  # loops over messages, the innermost last -> the message that each has come to

    def note(kind: str, loop: int, value: Any) -> None:
        if kind == "turn" and id(value) in numbers:
            speaking[loop] = numbers[id(value)]
        elif kind == "end":
            speaking.pop(loop, None)
        events.append(Event(kind, loop, value, written))
        turns.append(next(reversed(speaking.values()), None))

    given = {"documents": None, "add_generation_prompt": False, **variables, "messages": messages}
    context = given | {_TRACE: note, BUDGET: Budget()}
    try:
        for piece in _traced_template(template).generate(context):
            pieces.append(piece)
            written += len(piece)
    except Exception as error:  # a template runs any expression over the row, and may fail in any way
        raise refusal(error) from error
    return Trace("".join(pieces), events, turns)


def refusal(error: Exception) -> ValueError:
    """A failure inside a template as a fault of the row that it renders."""
    return ValueError(f"the chat template refuses the conversation: {str(error) or type(error).__name__}")


def variables_read(source: str) -> frozenset[str]:
    """The names that a template reads and does not set itself. Raises ValueError for one with a fault in its syntax."""
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(source)))
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is faulty: {error}") from error


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """The environment of `apply_chat_template`, with limits.

    It is made for an empty template, because compiling one already computes its constant expressions.
    """
    environment = _compile_jinja_template("").environment
    assert isinstance(environment, SandboxedEnvironment)
    limit_environment(environment)
    environment.filters[_TRACE] = _record
    return environment


@lru_cache(maxsize=16)
def _traced_template(source: str) -> jinja2.Template:
    """The template with notes of its loops and generation marks, which write nothing."""
    environment = _environment()
    tree = environment.parse(source)
    for number, parent, body, node in list(_marked_nodes(tree)):
        at = next(place for place, child in enumerate(body) if child is node)
        if isinstance(node, nodes.For):
            assert isinstance(node.target, nodes.Name)
            node.body.insert(0, _note(node, "turn", number, nodes.Name(node.target.name, "load")))
            body.insert(at + 1, _note(parent, "end", number))
        else:
            body.insert(at, _note(parent, "open", number))
            body.insert(at + 2, _note(parent, "close", number))
    limit_tree(tree)
    tree.set_environment(environment)
    # The globals as one dict: every rendering copies them, and jinja's own chain of mappings takes long to copy.
    return jinja2.Template.from_code(environment, environment.compile(tree), dict(environment.globals))


@jinja2.pass_context
def _record(context: jinja2.runtime.Context, value: Any, kind: str, loop: int) -> None:
    context[_TRACE](kind, loop, value)


def _marked_nodes(tree: nodes.Template):
    """Loops over one name and `{% generation %}` blocks: a number each, the parent, the list they are in."""
    number = 0
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for _, body in parent.iter_fields():
            for node in list(body) if isinstance(body, list) else []:
                loop = isinstance(node, nodes.For) and isinstance(node.target, nodes.Name)
                if loop or _is_generation(node):
                    number += 1
                    yield number, parent, body, node


def _is_generation(node: Any) -> bool:
    call = node.call.node if isinstance(node, nodes.CallBlock) else None
    return isinstance(call, nodes.ExtensionAttribute) and call.name == "_generation_support"


def _note(near: nodes.Node, kind: str, number: int, value: nodes.Expr | None = None) -> nodes.ExprStmt:
    """A statement that notes where it is. A filter, since the sandbox would check every call of a function."""
    noted = nodes.Const(None) if value is None else value
    arguments: list[nodes.Expr] = [nodes.Const(kind), nodes.Const(number)]
    statement = nodes.ExprStmt(nodes.Filter(noted, _TRACE, arguments, [], None, None))
    statement.set_lineno(near.lineno)
    return statement
