"""A conversation with a model: what it is asked, what is shown, and what is saved."""

import io
import json
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from jaxtrain.recipes.chat import TerminalDisplay, chat, finished_blocks
from jaxtrain.sample.requests import SamplingParams

MAX_LENGTH = 96


class Talk:
    """A display with the messages that it is asked for, and a model that repeats how many messages it was given."""

    def __init__(self, *said, interactive=True, interrupt=False):
        self._said, self._interrupt, self.interactive = iter(said), interrupt, interactive
        self.asked, self.notes, self.answers = [], [], []
        engine = SimpleNamespace(max_length=MAX_LENGTH, stream=self._stream)
        self.served = SimpleNamespace(engine=engine, ending=lambda params: params, prompt_ids=self._prompt_ids)

    def ask(self):
        for text in self._said:
            return text
        raise EOFError

    def note(self, text):
        self.notes.append(text)

    @contextmanager
    def answer(self):
        self.answers.append("")
        yield self._show

    def _show(self, text):
        self.answers[-1] += text

    def _prompt_ids(self, row):
        self.asked.append(row["messages"])
        return np.zeros(sum(len(message["content"]) for message in row["messages"]), np.int32)

    def _stream(self, requests):
        (request,) = requests
        self.params = request.params
        yield SimpleNamespace(text="ans")
        if self._interrupt:
            raise KeyboardInterrupt
        yield SimpleNamespace(text=f"wer {len(self.asked[-1])}")

    def run(self, system=None):
        chat(self.served, SamplingParams(max_tokens=60), self, system)
        return self


def message(role, content):
    return {"role": role, "content": content}


def test_a_conversation_remembers_what_was_said():
    talk = Talk("a", " ", "b", interactive=False).run(system="s")
    first = [message("system", "s"), message("user", "a")]
    assert talk.asked == [first, [*first, message("assistant", "answer 2"), message("user", "b")]]
    assert talk.answers == ["answer 2", "answer 4"] and not talk.notes
    assert talk.params.max_tokens == 60


def test_commands_begin_anew_and_save(tmp_path):
    file = tmp_path / "talk.jsonl"
    save = f"/save {file}"
    talk = Talk(save, "a", save, "/clear", "b", "/system t", "c", save, "/save", "/no", " /no", "/help").run("s")
    ask = lambda system, text: [message("system", system), message("user", text)]  # noqa: E731
    assert talk.asked[:3] == [ask("s", "a"), ask("s", "b"), ask("t", "c")] and talk.asked[3][-1]["content"] == " /no"
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert rows == [[*asked, message("assistant", "answer 2")] for asked in (ask("s", "a"), ask("t", "c"))]
    assert [note.split(":")[0] for note in talk.notes[:1]] == ["there is nothing to save"]
    assert "/save needs an argument" in talk.notes and "there is no command /no" in talk.notes[-2]
    Talk("a", f"/save {tmp_path}").run().notes[-1].index("not saved")


def test_a_slash_is_no_command_through_a_pipe():
    assert Talk("/clear", interactive=False).run().asked == [[message("user", "/clear")]]


def test_a_message_without_room_for_its_answer_is_taken_back_or_ends_a_pipe():
    talk = Talk("a", "b" * MAX_LENGTH, "c").run()
    assert "leaves no room for an answer" in talk.notes[0] and "/clear" in talk.notes[0]
    assert [each["content"] for each in talk.asked[-1]] == ["a", "answer 1", "c"]
    with pytest.raises(ValueError, match="the conversation has 96 tokens, and max_length=96"):
        Talk("b" * MAX_LENGTH, interactive=False).run()
    assert Talk("b" * 90).run().params.max_tokens == 6


def test_an_interrupted_answer_is_kept():
    talk = Talk("a", "b", interrupt=True).run()
    assert [each["content"] for each in talk.asked[-1]] == ["a", "ans", "b"]
    with pytest.raises(KeyboardInterrupt):
        Talk("a", interrupt=True, interactive=False).run()


def shown(*parts):
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    display = TerminalDisplay(console)
    with display.answer() as show:
        for part in parts:
            show(part)
    return console.file.getvalue()


def test_a_terminal_shows_markdown_and_loses_no_words():
    text = "<think>why</think>\n\n# Title\n\none\ntwo **bold**\n\n```\na\n\n<b>\n```\n\n- x\n- y\n"
    once, grown = shown(text), shown(*text)
    for word in ("<think>why</think>", "Title", "bold", "<b>", "x", "y"):
        assert word in once and word in grown
    assert "**" not in once and "one two" not in once


@pytest.mark.parametrize(("compiling", "word"), [(True, "compiling"), (False, "answering")])
def test_a_terminal_shows_what_the_model_is_busy_with(monkeypatch, compiling, word):
    monkeypatch.setattr("jaxtrain.recipes.chat.is_compiling", lambda thread: compiling)
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    with TerminalDisplay(console).answer():
        ends = time.monotonic() + 10
        while word not in console.file.getvalue() and time.monotonic() < ends:
            time.sleep(0.05)
    assert word in console.file.getvalue()


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("a", ""),
        ("a\n\nb", "a\n\n"),
        ("```\na\n\nb", ""),
        ("```\na\n\n```\n\nb", "```\na\n\n```\n\n"),
        ("~~~~\n~~~\n\n~~~~ x\n\n", ""),
        ("a\n\n  ", "a\n\n"),
    ],
)
def test_blocks_are_finished_at_a_blank_line_outside_of_code(text, finished):
    assert finished_blocks(text) == (finished, text[len(finished) :])
