import math

import numpy as np
import pytest

from jaxtrain.rl.environments import GuessingGame, NumberReversal, Opening, Reply, checked_opening, checked_reply

SAY = [{"role": "user", "content": "say"}]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (None, "step must return a Reply, not NoneType"),
        (([], 1.0), "step must return a Reply, not tuple"),
        (Reply(reward="1.0"), "Reply.reward must be a number, not str"),
        (Reply(reward=None), "Reply.reward must be a number, not NoneType"),
        (Reply(reward=math.nan), "Reply.reward must be finite in float32, not nan"),
        (Reply(reward=math.inf), "Reply.reward must be finite in float32, not inf"),
        (Reply(reward=1e39), "Reply.reward must be finite in float32, not 1e\\+39"),
        (Reply("try again", 0.0), "Reply.messages must be a list of messages, not str"),
        (Reply(SAY[0]), "Reply.messages must be a list of messages, not dict"),
        (Reply([{"content": "x"}]), r"Reply.messages\[0\] must be a mapping with a role"),
        (Reply([{"role": "user", "content": None}]), "content must be a string, not NoneType"),
        (Reply([*SAY, {"role": "user", "content": "a\udc00"}]), r"Reply.messages\[1\]: the text is not valid Unicode"),
        (Reply(SAY, calls=1.5), "Reply.calls must be an integer"),
        (Reply([{"role": "user", "content": [5]}]), r"Reply.messages\[0\]: a part of the content must be"),
        (Reply([{"role": "user", "content": [{"type": "image", "url": "x"}]}]), "a part of the content must be"),
        (Reply([{"role": "user", "content": "x", "tool_calls": 5}]), "tool_calls must be a list of mappings, not 5"),
    ],
)
def test_an_invalid_reply_is_refused(reply, expected):
    with pytest.raises(ValueError, match=expected):
        checked_reply(reply)


@pytest.mark.parametrize("reward", [1, True, np.float32(1), np.array(1.0)])
def test_a_reward_is_any_number(reward):
    reply = checked_reply(Reply(SAY, reward))
    assert reply.reward == 1.0 and type(reply.reward) is float and reply.messages == SAY


@pytest.mark.parametrize(
    ("opening", "expected"),
    [
        (None, "reset must return an Opening, not NoneType"),
        (SAY, "reset must return an Opening, not list"),
        (Opening([{"content": "x"}]), "must be a mapping with a role"),
        (Opening([]), "Opening.messages must not be empty"),
        (Opening(SAY, ["calculator"]), "Opening.tools must be a list of JSON schemas"),
        (Opening(SAY, [{"name": "a\udc00"}]), r"Opening.tools\[0\]: the text is not valid Unicode"),
    ],
)
def test_an_invalid_opening_is_refused(opening, expected):
    with pytest.raises(ValueError, match=expected):
        checked_opening(opening)
    assert checked_opening(Opening(SAY)) == Opening(SAY)


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "Try "}, {"type": "text", "text": "again"}]
    assert checked_reply(Reply([{"role": "user", "content": parts}])).messages == [
        {"role": "user", "content": "Try again"}
    ]


def test_number_reversal_gives_three_tries():
    game = NumberReversal()
    assert "1234" in game.reset({"number": 1234}).messages[0]["content"]
    assert game.step("4322").reward == 0.75 and game.step("1").messages and not game.step("").messages


def test_the_guessing_game_halves_the_reward_of_a_correct_guess():
    game = GuessingGame(largest=30)
    assert "from 1 to 30" in game.reset({"secret": 12}).messages[0]["content"]
    assert game.step("9").messages[0]["content"] == "Higher."
    assert game.step("9" * 5000).messages[0]["content"] == "Lower."  # more digits than int() converts
    assert game.step("It is 012") == Reply(reward=0.25)
    assert game.step("none") == Reply()
