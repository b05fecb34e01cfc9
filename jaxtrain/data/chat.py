"""Conversations -> token ids and the mask of what the assistant says, for any chat template.

The ids are those of the tokenizer's own `apply_chat_template`. The mask is found in the rendered text and carried to
the tokens by their character offsets, so it cannot change the ids. Where the assistant speaks is found in this order:

1. by the template's own `{% generation %}` marks;
2. by tracing: the template's syntax tree gets a call at the head of every loop over messages, which writes nothing but
   notes how much has been written when a message's turn comes. Of an assistant's turn, what `add_generation_prompt`
   writes is the prompt's, all else up to the end-of-turn token is the assistant's. This also holds where a template
   rewrites earlier turns, as Qwen3's does with thinking;
3. where a template does not loop over its messages: by the difference between the conversation up to a turn and
   including it, which is an error where the one is not the beginning of the other.
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jinja2 import nodes
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

Message = dict[str, Any]
Span = tuple[int, int]  # [start, end) in the characters of the rendered text

_TRACE = "_jaxtrain_trace"
_PROBE = "jaxtrain-probe"


class EncodedChat(NamedTuple):
    input_ids: np.ndarray  # [n] int32
    mask: np.ndarray  # [n] bool, the assistant's tokens and their end-of-turn tokens


class ChatTokenizer:
    """A tokenizer with a chat template, as a function of conversations. Safe to call from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """Raises ValueError for a tokenizer without a chat template."""
        if not tokenizer.chat_template:
            raise ValueError(
                f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template, which conversations need: give one "
                "as model.chat_template (a jinja file); prompt and completion that are strings can do without, with "
                "data.prompt_format=plain"
            )
        self._tokenizer = tokenizer
        self._encode = without_limits(tokenizer).encode
        self._special = tuple(sorted(tokenizer.added_tokens_encoder, key=len, reverse=True))
        self._headers = lru_cache(maxsize=256)(self._find_headers)

    def __call__(
        self,
        messages: list[Message],
        *,
        tools: list[Any] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        first_trained: int = 0,
    ) -> EncodedChat:
        """Encode a conversation; assistant turns before message number `first_trained` stay out of the mask.

        Raises ValueError where the template refuses the conversation or the assistant's part of it cannot be found.
        """
        kwargs = template_kwargs or {}
        messages = [_with_reasoning_names(message) for message in messages]
        text = self.render(messages, tools=tools, template_kwargs=kwargs)
        spans = self._assistant_spans(text, messages, tools, kwargs)
        trained = [span for index, span in spans if index >= first_trained]
        encoding = self._encode(text, add_special_tokens=False)
        return EncodedChat(np.array(encoding.ids, np.int32), tokens_within(encoding.offsets, trained))

    def prompt(
        self, messages: list[Message], *, tools: list[Any] | None = None, template_kwargs: dict[str, Any] | None = None
    ) -> np.ndarray:
        """The ids [n] int32 that make the model answer `messages`."""
        text = self.render(messages, tools=tools, template_kwargs=template_kwargs or {}, add_generation_prompt=True)
        return np.array(self._encode(text, add_special_tokens=False).ids, np.int32)

    def reply(self, messages: list[Message], template_kwargs: dict[str, Any] | None = None) -> tuple[list[int], int]:
        """What stands between two turns of the assistant: the ids of the end of its turn, `messages` and the prompt
        for its next one; and how many of them end its turn (the ids that a sampler may have drawn itself already).

        Only this is rendered, after a turn that stands for any: what was said before is never tokenised again.
        """
        kwargs = template_kwargs or {}
        before = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        text = self.render(before + messages, tools=None, template_kwargs=kwargs, add_generation_prompt=True)
        _, *between = text.split(_PROBE, 2)
        if len(between) != 2:
            raise ValueError("the chat template does not write an assistant's turn as it is: nothing can follow it")
        end = self._end_of_turn(between[1], 0, 0)
        encoding = self._encode(between[1], add_special_tokens=False)
        return encoding.ids, sum(start < end for start, _ in encoding.offsets)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[Any] | None,
        template_kwargs: dict[str, Any],
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **template_kwargs,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        assert isinstance(text, str)
        return text

    def _assistant_spans(
        self, text: str, messages: list[Message], tools: list[Any] | None, kwargs: dict[str, Any]
    ) -> list[tuple[int, Span]]:
        template = self._tokenizer.get_chat_template(tools=tools)
        trace = _trace(template, messages, {"tools": tools, **self._tokenizer.special_tokens_map, **kwargs})
        if trace.text != text:  # the template depends on more than it is given
            return self._spans_by_prefix(text, messages, tools, kwargs)
        if trace.generated:
            return trace.generated
        assistant = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        blocks = trace.blocks()
        if any(index not in blocks for index in assistant):
            return self._spans_by_prefix(text, messages, tools, kwargs)
        headers = self._headers(template, json.dumps(kwargs, sort_keys=True))
        return [(index, self._answer_within(text, blocks[index], headers)) for index in assistant]

    def _answer_within(self, text: str, block: Span, headers: tuple[str, ...]) -> Span:
        start, end = block
        header = next((header for header in headers if text.startswith(header, start, end)), None)
        if header is None:
            raise ValueError(
                f"the chat template begins an assistant turn with {text[start : start + 40]!r} but prompts for one "
                f"with {headers[0]!r}: mark the assistant's part with {{% generation %}} in a model.chat_template"
            )
        return start + len(header), self._end_of_turn(text, start + len(header), end)

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """The end of the turn without what the template writes after its end-of-turn token, such as a line break."""
        stripped = start + len(text[start:end].rstrip())
        if any(text.endswith(token, start, stripped) for token in self._special):
            return stripped
        # Some templates write the end-of-turn token once, after the loop.
        after = next((token for token in self._special if text.startswith(token, end)), "")
        return end + len(after)

    def _find_headers(self, template: str, kwargs_json: str) -> tuple[str, ...]:
        """What may stand before an assistant's own words: the generation prompt, and how an earlier turn begins.

        They differ where the prompt holds more than the role (an empty thought, say), which earlier turns do not keep.
        """
        variables = {"tools": None, **self._tokenizer.special_tokens_map, **json.loads(kwargs_json)}
        user, answer = {"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}
        plain = _trace(template, [user], variables).text
        prompted = _trace(template, [user], {**variables, "add_generation_prompt": True})
        # Some templates write an end of the text in place of the prompt; the prompt is then what follows the loop.
        before = len(plain) if prompted.text.startswith(plain) else prompted.blocks()[0][1]
        full = _trace(template, [user, answer, user, answer], variables)
        start, end = full.blocks()[1]
        return prompted.text[before:], full.text[start : full.text.index(_PROBE, start, end)]

    def _spans_by_prefix(
        self, text: str, messages: list[Message], tools: list[Any] | None, kwargs: dict[str, Any]
    ) -> list[tuple[int, Span]]:
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], tools=tools, template_kwargs=kwargs, add_generation_prompt=True)
            after = self.render(messages[: index + 1], tools=tools, template_kwargs=kwargs)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"messages[{index}]: the chat template writes this turn differently once others follow, so the "
                    "assistant's tokens cannot be told: mark them with {% generation %} in a model.chat_template"
                )
            spans.append((index, (len(before), self._end_of_turn(text, len(before), len(after)))))
        return spans


def without_limits(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The `tokenizers.Tokenizer` inside, told not to pad or cut whatever its file says: packing does both."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return backend


def tokens_within(offsets: list[Span], spans: list[Span]) -> np.ndarray:
    """Tokens [n] bool whose first character lies in one of the spans.

    A token that straddles the beginning of a span is not in it: the model never gets to choose that token, because the
    prompt before the span has been tokenised on its own when it is asked.
    """
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    within = np.zeros(len(starts), bool)
    for start, end in spans:
        within |= (starts >= start) & (starts < end) & (ends > start)
    return within


class _Event(NamedTuple):
    kind: str  # "turn": a loop comes to `value`; "end": that loop is over; "open", "close": of a {% generation %}
    loop: int
    value: Any
    at: int  # characters written so far


class _Trace(NamedTuple):
    text: str
    events: list[_Event]
    turns: list[int | None]  # of each event: the number of the message whose turn it is

    @property
    def generated(self) -> list[tuple[int, Span]]:
        """The spans in `{% generation %}` marks and the messages they belong to."""
        marks = self._at("open", "close")
        pairs = zip(marks[::2], marks[1::2], strict=True)
        return [(turn or 0, (start, end)) for (start, turn), (end, _) in pairs if start < end]

    def blocks(self) -> dict[int, Span]:
        """What the template's loops wrote for each message; without those for which that cannot be said."""
        found: dict[int, list[Span]] = {}
        for (start, turn), (end, _) in pairwise([*_changes(self._at("turn", "end")), (len(self.text), None)]):
            if turn is not None and self.text[start:end].strip():
                found.setdefault(turn, []).append((start, end))
        return {turn: spans[0] for turn, spans in found.items() if len(spans) == 1}

    def _at(self, *kinds: str) -> list[tuple[int, int | None]]:
        noted = zip(self.events, self.turns, strict=True)
        return [(event.at, turn) for event, turn in noted if event.kind in kinds]


def _changes(bounds: list[tuple[int, int | None]]) -> list[tuple[int, int | None]]:
    """Without the bounds of inner loops, at which the turn stays the same."""
    changed, last = [], None
    for at, turn in bounds:
        if turn != last:
            changed.append((at, turn))
        last = turn
    return changed


def _trace(template: str, messages: list[Message], variables: dict[str, Any]) -> _Trace:
    written, pieces, events, turns = 0, [], [], []
    messages = [dict(message) for message in messages]  # told apart by identity, so each must be an object of its own
    numbers = {id(message): number for number, message in enumerate(messages)}
    speaking: tuple[int, int] | None = None  # the loop and the message whose turn it is

    def note(kind: str, loop: int, value: Any = None) -> str:
        nonlocal speaking
        if kind == "turn" and id(value) in numbers:
            speaking = (loop, numbers[id(value)])
        elif kind == "end" and speaking is not None and speaking[0] == loop:
            speaking = None
        events.append(_Event(kind, loop, value, written))
        turns.append(speaking and speaking[1])
        return ""

    context = {"documents": None, "add_generation_prompt": False, **variables, "messages": messages, _TRACE: note}
    try:
        for piece in _traced_template(template).generate(context):
            pieces.append(piece)
            written += len(piece)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
    return _Trace("".join(pieces), events, turns)


@lru_cache(maxsize=16)
def _traced_template(source: str) -> jinja2.Template:
    """The template with notes of its loops and generation marks, which write nothing."""
    environment = _compile_jinja_template(source).environment  # the one that apply_chat_template renders with
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
    tree.set_environment(environment)
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


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


def _note(near: nodes.Node, kind: str, number: int, *value: nodes.Expr) -> nodes.Output:
    arguments = [nodes.Const(kind), nodes.Const(number), *value]
    call = nodes.Call(nodes.Name(_TRACE, "load"), arguments, [], None, None)
    output = nodes.Output([call])
    output.set_lineno(near.lineno)
    return output


def _with_reasoning_names(message: Message) -> Message:
    """Without nulls, and with the thought under every name that templates read, as transformers passes it on."""
    message = {key: value for key, value in message.items() if value is not None}
    thoughts = [message[name] for name in ("reasoning_content", "thinking", "reasoning") if name in message]
    return {"thinking": thoughts[0], **message, "reasoning_content": thoughts[0]} if thoughts else message
