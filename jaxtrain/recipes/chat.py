"""A conversation with a model: on a terminal with Markdown and commands, or through pipes as plain text."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from markdown_it import MarkdownIt
from rich.console import Console, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.spinner import Spinner

from jaxtrain.observe.compilations import is_compiling
from jaxtrain.sample.requests import Request, SamplingParams
from jaxtrain.serve.served import Served

COMMANDS = {
    "/clear": "start a new conversation",
    "/system TEXT": "start a new conversation with this system prompt",
    "/save FILE": "append the conversation to a .jsonl file, as a row of training data with `messages`",
    "/help": "list the commands",
}
_REFRESHES = 8.0  # of an answer on a terminal, in a second


class Display(Protocol):
    """Where a conversation is read from and shown."""

    interactive: bool
    """Whether a person is there who can react to an error."""

    def ask(self) -> str:
        """The user's next message. Raises EOFError at the end."""
        ...

    def note(self, text: str) -> None:
        """Show something that the model did not say."""
        ...

    def answer(self) -> AbstractContextManager[Callable[[str], None]]:
        """A context in which the function it gives is called with the parts of an answer."""
        ...


class PlainDisplay:
    """Reads standard input and writes the answers as they are to standard output: for pipes."""

    interactive = False

    def ask(self) -> str:
        return input()

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    @contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        yield lambda text: print(text, end="", flush=True)
        print()


class TerminalDisplay:
    """Shows answers as Markdown while they grow, and before their first token what the model is busy with."""

    interactive = True

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)

    def ask(self) -> str:
        return self._console.input("> ", markup=False)

    def note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False)

    @contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        """Finished blocks are printed; only the last one is drawn again, since a terminal cannot redraw what has
        scrolled out of it."""
        shown, main = "", threading.get_ident()

        def growing() -> RenderableType:
            if shown:
                return markdown(shown)
            return Spinner("dots", "compiling" if is_compiling(main) else "answering")

        def add(text: str) -> None:
            nonlocal shown
            finished, shown = finished_blocks(shown + text)
            if finished:
                self._console.print(markdown(finished))

        try:
            with Live(console=self._console, get_renderable=growing, refresh_per_second=_REFRESHES, transient=True):
                yield add
        finally:  # also of an answer that was interrupted
            if shown:
                self._console.print(markdown(shown))


def finished_blocks(text: str) -> tuple[str, str]:
    """The Markdown blocks of `text` that cannot change any more, and the rest: a block ends at a blank line outside of
    fenced code."""
    end = position = 0
    fence = ""
    for line in text.splitlines(keepends=True):
        position += len(line)
        words = line.strip()
        if fence:
            fence = "" if words.startswith(fence) and not words.strip(fence[0]) else fence
        elif words.startswith(("```", "~~~")):
            fence = words[: len(words) - len(words.lstrip(words[0]))]
        elif not words and line.endswith("\n"):
            end = position
    return text[:end], text[end:]


def markdown(text: str) -> Markdown:
    """`text` as Markdown in which tags, such as those of thoughts, are words, and every line break is kept."""
    shown = Markdown(text)
    shown.parsed = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(text)
    for token in shown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return shown


def chat(served: Served, params: SamplingParams, display: Display, system: str | None = None) -> None:
    """Run a conversation until the user's input ends; Ctrl-C ends an answer. `system` is the system prompt.

    Answers are limited by the engine's `max_length`. Raises ValueError, where nobody can react to it, for a message
    that the chat template refuses and for a conversation that leaves no room for an answer.
    """
    params = served.ending(params)
    messages = _opening(system)
    while True:
        try:
            said = display.ask()
        except EOFError:
            return
        if not said.strip():
            continue
        if said.startswith("/") and display.interactive:
            messages = _command(said, messages, display)
            continue
        asked = [*messages, {"role": "user", "content": said}]
        try:
            request = _request(served, asked, params)
        except ValueError as error:
            if not display.interactive:
                raise
            display.note(f"{error}; /clear starts a new conversation")
            continue
        messages = [*asked, {"role": "assistant", "content": _answer(served, request, display)}]


def _opening(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _request(served: Served, messages: list[dict[str, str]], params: SamplingParams) -> Request:
    prompt = served.prompt_ids({"messages": messages})
    room = served.engine.max_length - len(prompt)
    if room < 1:
        raise ValueError(
            f"the conversation has {len(prompt)} tokens, and max_length={served.engine.max_length} leaves no room "
            "for an answer: start a new conversation, or use a larger --max-length"
        )
    return Request(prompt, replace(params, max_tokens=min(params.max_tokens or room, room)))


def _answer(served: Served, request: Request, display: Display) -> str:
    answer = ""
    try:
        with display.answer() as show:
            for chunk in served.engine.stream([request]):
                answer += chunk.text or ""
                show(chunk.text or "")
    except KeyboardInterrupt:
        if not display.interactive:
            raise
        display.note("interrupted")
    return answer


def _command(said: str, messages: list[dict[str, str]], display: Display) -> list[dict[str, str]]:
    """Carry out a command. Returns the messages of the conversation after it."""
    name, _, argument = said.strip().partition(" ")
    argument = argument.strip()
    known = {usage.partition(" ")[0]: bool(usage.partition(" ")[2]) for usage in COMMANDS}
    if name not in known:
        display.note(f"there is no command {name}: /help lists them; a message may begin with a blank before the /")
    elif known[name] != bool(argument):
        display.note(f"{name} needs an argument" if known[name] else f"{name} has no argument")
    elif name == "/help":
        display.note("\n".join(f"{usage:<14}{text}" for usage, text in COMMANDS.items()))
    elif name == "/save":
        _save_conversation(Path(argument).expanduser(), messages, display)
    else:
        kept = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        display.note("a new conversation")
        return _opening(argument if name == "/system" else kept)
    return messages


def _save_conversation(file: Path, messages: list[dict[str, str]], display: Display) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        display.note("there is nothing to save: the model has not answered yet")
        return
    try:
        with file.open("a") as out:
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        display.note(f"not saved: {error}")
        return
    display.note(f"appended {len(messages)} messages to {file}")
