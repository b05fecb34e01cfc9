import pytest

from jaxtrain.data.messages import conversation, question

CHAT = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "Paris"}]


def test_a_conversation_tells_the_prompt_from_what_is_trained():
    found = conversation({"prompt": CHAT + CHAT[:1], "completion": CHAT[1:]})
    assert found.messages == CHAT + CHAT and found.first_trained == 3
    assert found.weights == [None] * 4
    assert found.trained("assistant") == [0, 0, 0, 1] and found.trained("all") == [1, 1, 1, 1]


def test_weights_leave_the_messages():
    found = conversation({"messages": [CHAT[0] | {"weight": 0}, CHAT[1] | {"train": True}]})
    assert found.messages == CHAT and found.weights == [0, 1]
    assert found.trained("assistant") == [0, 1] and found.trained("all") == [0, 1]


def test_sharegpt_messages_keep_their_other_keys():
    call = {"name": "f", "arguments": {}}
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": None, "tool_calls": [call], "train": False}]
    found = conversation({"conversations": [*talk, {"from": "tool", "value": "r"}, {"from": "gpt", "value": "A"}]})
    assert found.messages[1] == {"role": "assistant", "content": None, "tool_calls": [call]}
    assert found.weights == [None, 0, None, None]


def test_a_question_is_a_string_or_messages():
    assert question({"prompt": "What"}).messages == CHAT[:1]
    found = question({"prompt": CHAT[:1], "tools": '[{"name": "f"}]', "chat_template_kwargs": {"a": 1}})
    assert (found.messages, found.tools, found.template_kwargs) == (CHAT[:1], [{"name": "f"}], {"a": 1})


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": ["user"], "content": "x"}, "unknown role"),
        ({"from": ["human"], "value": "x"}, "unknown speaker"),
        ({"role": "assistant", "content": "x", "tool_calls": 5}, "tool_calls must be a list, not int"),
        ({"role": "assistant", "content": "x", "tool_calls": ["f"]}, "a tool call must be a mapping"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "arguments: broken JSON"),
    ],
)
def test_wrong_types_are_named(message, reason):
    with pytest.raises(ValueError, match=rf"messages\[1\].*{reason}"):
        conversation({"messages": [CHAT[0], message]})


def test_null_and_other_kinds_are_named():
    with pytest.raises(ValueError, match="the column 'prompt' is null"):
        conversation({"prompt": None, "completion": "b"})
    with pytest.raises(ValueError, match="a row of 'text' is no conversation"):
        conversation({"text": "x"})
