"""The reasoning and the content of a text are the same however it is cut into pieces."""

import pytest

from jaxtrain.serve.outputs import Parts, Splitter, parser, settled, thought_of

PLAIN = parser("", None)


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (PLAIN, " hello ", Parts("", " hello ", [])),
        (PLAIN, "", Parts("", "", [])),
        (PLAIN, "<think>\nso so\n</think>\n\nhello ", Parts("so so", "hello ", [])),
        (PLAIN, "<thin", Parts("", "<thin", [])),
        (PLAIN, "<think>never closed", Parts("never closed", "", [])),
        (PLAIN, "<tool_call>{}</tool_call>", Parts("", "<tool_call>{}</tool_call>", [])),
        (parser("<think>", None), "so</think>hello", Parts("so", "hello", [])),
    ],
)
def test_a_text_is_split_at_once_and_in_pieces(parse, text, expected):
    assert parse(text, True) == expected
    for size in (1, 2, 7):
        splitter = Splitter(parse)
        pieces = [splitter.feed(text[at : at + size], False) for at in range(0, len(text), size)]
        pieces.append(splitter.feed("", True))
        assert "".join(each.reasoning for each in pieces) == expected.reasoning
        assert "".join(each.content for each in pieces) == expected.content


def test_content_is_streamed_before_the_end():
    assert Splitter(PLAIN).feed("hello there", False).content == "hello there"


def test_the_beginning_of_a_mark_is_held_back_until_the_end():
    assert settled("a <to", ("<tool>",), False) == "a " and settled("a <to", ("<tool>",), True) == "a <to"
    assert settled("a <tx", ("<tool>",), False) == "a <tx"


def test_a_prompt_may_open_a_thought():
    assert thought_of("<|im_start|>assistant\n<think>\n") == "<think>"
    assert thought_of("<think>\n\n</think>\n\n") == thought_of("") == ""
