"""How families of models write tool calls, and how their texts are read.

The format of a model is found in its chat template. Text that looks like a call and is none stays content.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtrain.serve.outputs import CalledTool, CallReader, Parser, Parts, settled
from jaxtrain.serve.schema import Tool

_DECODER = json.JSONDecoder()
_ANY = {"type": "object"}


class ToolFormat(NamedTuple):
    name: str
    marks: tuple[str, ...]  # of which a template in this format has one
    read: CallReader | None  # None: the whole text is parsed by `parse_harmony`
    begin: str = ""  # the text around a JSON object of a call, which a forced call begins and ends with
    end: str = ""
    arguments: str = "arguments"  # the key of the arguments in this object


def read_hermes(text: str, final: bool) -> tuple[str, list[CalledTool]]:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, as often as needed, of Qwen and Hermes."""
    begin, end = "<tool_call>", "</tool_call>"
    content, calls = "", []
    while True:
        before, found, rest = text.partition(begin)
        content += before if found else settled(before, (begin,), final)
        if not found:
            break
        body, closed, after = rest.partition(end)
        if not closed and not final:
            break
        call = _call_in(body)
        if call is None:
            content += begin + body + closed
        else:
            calls.append(call)
        text = after
    return _trimmed(content, calls, final), calls


def read_llama(text: str, final: bool) -> tuple[str, list[CalledTool]]:
    """{"name": ..., "parameters": {...}} as the whole text, or several of them one after the other, of Llama 3."""
    mark = "<|python_tag|>"
    body = text.lstrip()
    if not final and mark.startswith(body):
        return "", []
    if not body.startswith((mark, "{")):
        return text, []
    if not final:
        return "", []  # it may still turn out to be something else
    calls, rest = _calls_in(body.removeprefix(mark).lstrip(), separators="; \n")
    return ("", calls) if calls and not rest.strip() else (text, [])


def read_mistral(text: str, final: bool) -> tuple[str, list[CalledTool]]:
    """[TOOL_CALLS] and a list of {"name": ..., "arguments": {...}}, or name[ARGS]{...}, of Mistral."""
    mark = "[TOOL_CALLS]"
    before, found, rest = text.partition(mark)
    if not found:
        return _trimmed(settled(before, (mark,), final), [], final), []
    calls: list[CalledTool] = []
    while found:
        more, after = _mistral_calls(rest)
        if not more:
            break
        calls += more
        rest = after.lstrip()
        found, rest = (mark, rest.removeprefix(mark)) if rest.startswith(mark) else ("", rest)
    return _trimmed(before, calls, final) + (found + rest if final else ""), calls


def _mistral_calls(text: str) -> tuple[list[CalledTool], str]:
    """The calls at the beginning of a text that follows the mark, and what follows them."""
    if text.lstrip().startswith("["):
        calls, rest = _calls_in(text.lstrip()[1:], separators=", \n")
        return calls, rest.removeprefix("]")
    name, _, arguments = text.partition("[ARGS]")
    try:
        value, end = _DECODER.raw_decode(arguments)
    except (ValueError, RecursionError):
        return [], text
    name = name.partition("[CALL_ID]")[0].strip()
    return ([CalledTool(name, arguments[:end])], arguments[end:]) if name and isinstance(value, dict) else ([], text)


_RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.-]+)")
_HEADER_MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")


def parse_harmony(text: str, final: bool) -> Parts:
    """Messages of GPT-OSS: <|channel|>CHANNEL to=functions.NAME<|message|>BODY<|end|>, with special tokens kept."""
    reasoning, content, calls = [], [], list[CalledTool]()
    pieces = re.split(r"<\|(?:end|call|return)\|>", settled(text, _HEADER_MARKS, final))
    for number, piece in enumerate(pieces):
        header, found, body = piece.partition("<|message|>")
        complete = final or number < len(pieces) - 1
        if not found:
            if complete and header.strip() and not header.startswith("<|"):
                content.append(header)
            continue
        recipient = _RECIPIENT.search(header)
        if recipient is not None:
            if complete and _is_object(body):
                calls.append(CalledTool(recipient[1], body.strip()))
            elif complete:
                content.append(body)
        elif "<|channel|>analysis" in header:
            reasoning.append(body)
        else:
            content.append(body)
    return Parts("\n".join(reasoning), "\n".join(content), calls)


HERMES = ToolFormat("hermes", ("<tool_call>",), read_hermes, "<tool_call>\n", "\n</tool_call>")
LLAMA = ToolFormat("llama", ("<|python_tag|>", '"parameters"', "ipython"), read_llama, arguments="parameters")
MISTRAL = ToolFormat("mistral", ("[TOOL_CALLS]",), read_mistral, "[TOOL_CALLS][", "]")
HARMONY = ToolFormat("harmony", ("<|channel|>",), None)


def tool_format(template: str | None) -> ToolFormat | None:
    """The format of a chat template; None for one without tools in a known format."""
    for known in (HARMONY, HERMES, MISTRAL, LLAMA):
        if any(mark in (template or "") for mark in known.marks):
            return known
    return None


def forced_call(found: ToolFormat | None, tools: Sequence[Tool]) -> str:
    """A Lark grammar of a call of one of `tools`. Raises ValueError for a format whose calls cannot be forced."""
    if found is None or found.read is None:
        raise ValueError("a call can only be required of models with the formats of Qwen, Hermes, Llama 3 and Mistral")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, found.arguments: tool.function.parameters or _ANY},
            "required": ["name", found.arguments],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    parts = [json.dumps(found.begin), "call", json.dumps(found.end)]
    rule = " ".join(part for part in parts if part != '""')
    options = {"x-guidance": {"whitespace_flexible": False}}
    return f"start: {rule}\ncall: %json {json.dumps({'anyOf': calls, **options})}\n"


def complete_parser(found: ToolFormat | None) -> Parser | None:
    """The parser of a format that has its own marks for reasoning, too."""
    return parse_harmony if found is HARMONY else None


def _call_of(value: Any) -> CalledTool | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str) and _is_object(arguments):
        return CalledTool(value["name"], arguments)
    return CalledTool(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _call_in(text: str) -> CalledTool | None:
    try:
        return _call_of(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _calls_in(text: str, separators: str) -> tuple[list[CalledTool], str]:
    """The calls at the beginning of a text, and the text that follows them."""
    calls: list[CalledTool] = []
    while text:
        try:
            value, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            break
        call = _call_of(value)
        if call is None:
            break
        calls.append(call)
        text = text[end:].lstrip(separators)
    return calls, text


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _trimmed(content: str, calls: list[CalledTool], final: bool) -> str:
    """Content without the white space before a call, which is held back until it is known that none follows."""
    return content if final and not calls else content.rstrip()
