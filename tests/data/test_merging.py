import pytest

from jaxtrain.data.merging import Turn, merge_turns


def turn(role, content="x", *, weight=None, in_prompt=False, **keys):
    return Turn({"role": role, "content": content, **keys}, weight, in_prompt, f"messages[{content}]")


def said(turns):
    return [(each.role, each.message["content"]) for each in turns]


TALK = [turn("system", "a"), turn("system", "b"), turn("user", "c"), turn("user", "d"), turn("assistant", "e")]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ([], [("system", "a"), ("system", "b"), ("user", "c"), ("user", "d"), ("assistant", "e")]),
        (["turns"], [("system", "a\n\nb"), ("user", "c\n\nd"), ("assistant", "e")]),
        (["system"], [("user", "a\n\nb\n\nc"), ("user", "d"), ("assistant", "e")]),
        (["turns", "system"], [("user", "a\n\nb\n\nc\n\nd"), ("assistant", "e")]),
    ],
)
def test_neighbours_are_joined_as_asked(how, expected):
    assert said(merge_turns(TALK, how)) == expected


def test_a_system_message_in_the_middle_joins_the_user_after_it():
    talk = [turn("user", "a"), turn("developer", "b"), turn("user", "c"), turn("assistant", "d")]
    assert said(merge_turns(talk, ["system"])) == [("user", "a"), ("user", "b\n\nc"), ("assistant", "d")]
    assert said(merge_turns(talk, ["turns", "system"])) == [("user", "a\n\nb\n\nc"), ("assistant", "d")]


def test_words_thoughts_and_calls_are_kept_in_their_order():
    one = turn("assistant", "a", reasoning_content="t", weight=0.5)
    (joined,) = merge_turns([one, turn("assistant", None, tool_calls=[1], weight=0.5)], ["turns"])
    assert joined.message == {"role": "assistant", "content": "a", "reasoning_content": "t", "tool_calls": [1]}
    assert joined.weight == 0.5
    (joined,) = merge_turns([joined, turn("assistant", None, tool_calls=[2], weight=0.5)], ["turns"])
    assert joined.message["tool_calls"] == [1, 2]
    (joined,) = merge_turns([turn("system", "a"), turn("user", "b", weight=0)], ["system"])  # SlimOrca's
    assert joined.weight == 0
    results = [turn("tool", "r"), turn("tool", "s")]
    assert merge_turns(results, ["turns"]) == results


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (turn("assistant", "a", weight=0), turn("assistant", "b"), "their weights differ"),
        (turn("user", "a", weight=1), turn("user", "b", weight=0), "their weights differ"),
        (turn("user", "a", in_prompt=True), turn("user", "b"), "one is in the prompt"),
        (turn("assistant", None, tool_calls=[1]), turn("assistant", "b"), "words after tool calls"),
        (turn("assistant", "a"), turn("assistant", "b", thinking="t"), "reasoning after words"),
        (turn("user", "a", name="n"), turn("user", "b", name="m"), "differ in name"),
    ],
)
def test_turns_that_one_turn_cannot_stand_for_are_refused(first, second, reason):
    with pytest.raises(ValueError, match=rf"messages\[b\]: data\.merge cannot join it to the turn before: .*{reason}"):
        merge_turns([first, second], ["turns"])
