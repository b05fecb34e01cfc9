"""Thoughts in the content of a turn: what the model must write, or a refusal, whatever the template reads."""

import pytest
from chat_templates import tokenizer
from stock_templates import STOCK, made, trained

from jaxtrain.data.chat import ChatTokenizer
from jaxtrain.data.formats import Encoder
from jaxtrain.data.packing import RowExamples
from jaxtrain.data.thoughts import split_thought, without_thought

USER = {"role": "user", "content": "What?"}
OPENED = (  # writes the key between marks that its prompt opens, and the content as it is: Qwen 3.8, Kimi K2
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
INLINE = "<think>\nI wonder\n</think>\n\nParis"


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


KEYED = [USER, answer("Paris", reasoning_content="I wonder")]


def opened():
    return tokenizer(OPENED, eos_token="<|im_end|>")


@pytest.mark.parametrize(
    "content", [INLINE, "I wonder\n</think>\n\nParis", "<|channel>thought\nI wonder\n<channel|>Paris"]
)
def test_a_thought_stands_where_the_template_reads_it(content):
    tok = opened()
    with pytest.warns(UserWarning, match="given to the chat template as reasoning_content"):
        row = Encoder(tok)({"messages": [USER, answer(content)]})
    assert isinstance(row, RowExamples) and row.events == ("thoughts_moved",)
    assert trained(tok, row.items[0]) == ["I wonder\n</think>\n\nParis<|im_end|>"]
    assert row.items[0].input_ids.tolist() == ChatTokenizer(tok)(KEYED).input_ids.tolist()


@pytest.mark.parametrize("name", STOCK)
def test_thoughts_in_the_content_equal_those_under_the_key(name):
    """Where the template reads the key; else the words are the turn's, or are refused."""
    tok = made(name)
    chat = ChatTokenizer(tok, date="2026-01-31")
    try:
        keyed = trained(tok, chat(KEYED))
    except ValueError:
        keyed = None
    try:
        (inline,) = trained(tok, chat([USER, answer(INLINE)]))
    except ValueError as error:
        assert keyed is None and "reasoning" in str(error)
        return
    assert inline.startswith(INLINE) if keyed is None else [inline] == keyed


def test_a_thought_of_a_call_stands_in_its_channel():
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tok = made("gpt-oss")
    inline, keyed = (
        ChatTokenizer(tok, date="2026-01-31")([USER, answer(tool_calls=[call], **more)])
        for more in ({"content": "<think>I wonder</think>"}, {"content": "", "reasoning_content": "I wonder"})
    )
    assert inline.input_ids.tolist() == keyed.input_ids.tolist() and inline.thoughts_moved


@pytest.mark.parametrize(
    ("template", "turn", "message"),
    [
        ("opened", answer("Well. " + INLINE), "must be its only one and be at its beginning"),
        ("opened", answer(INLINE + INLINE), "it has a thought in its content and another one beside it|its only one"),
        ("gpt-oss", answer("I wonder</think>Paris"), "must be its only one and be at its beginning"),
        ("opened", answer("<think>I won"), "begins a thought with <think> that does not end"),
        ("qwen3", answer("<think>I won"), "begins a thought with <think> that does not end"),
        ("qwen3", answer(INLINE, reasoning_content="Hm"), "a thought in its content and another one beside it"),
    ],
)
def test_thoughts_that_would_be_trained_as_words_are_refused(template, turn, message):
    chat = ChatTokenizer(opened() if template == "opened" else made(template))
    with pytest.raises(ValueError, match=rf"messages\[1\]: .*({message})"):
        chat([USER, turn])
    chat([USER, turn, USER, answer("Rome", reasoning_content="Now what")], weights=[0, 0, 0, 1], thoughts="accept")


def test_the_thought_and_the_answer_of_a_turn():
    inline, bare = answer(INLINE), answer("Paris")
    assert split_thought(KEYED[1]) == ("I wonder", "Paris")
    assert split_thought(inline) == ("\nI wonder\n", "\n\nParis")
    assert split_thought(bare) == ("", "Paris")
    assert without_thought(inline) == without_thought(KEYED[1]) == bare
