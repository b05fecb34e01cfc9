"""Loss weights of messages, in every way of writing them."""

import json

import numpy as np
import pytest
from chat_templates import BY_INDEX, CHATML, tokenizer

from jaxtrain.data.formats import Encoder

CHAT = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "Paris"}]


def chat_encoder(**options):
    tok = tokenizer(CHATML)
    return tok, Encoder(tok, **options)


def learned(tok, example):
    return tok.decode(example.input_ids[example.loss_weights > 0])


SECOND = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "tool"}]


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({"weight": 0}, 0),
        ({"weight": 1}, 1),
        ({"weight": 0.25}, 0.25),
        ({"train": False}, 0),
        ({"train": 0.5}, 0.5),
        ({"loss_scale": 2.0}, 2),
        ({"train": True}, 1),
        ({"loss": False}, 0),
        ({"weight": None, "train": None}, 1),
        ({"weight": 0, "train": False}, 0),
    ],
)
@pytest.mark.parametrize("sharegpt", [False, True])
def test_a_message_says_how_much_it_weighs(keys, weight, sharegpt):
    tok, encode = chat_encoder()
    messages = [CHAT[0], CHAT[1] | keys, *SECOND]
    if sharegpt:
        messages = [{"from": m["role"], "value": m["content"]} | {k: m[k] for k in keys if k in m} for m in messages]
    example = encode({"conversations" if sharegpt else "messages": messages})
    plain = encode({"messages": CHAT + SECOND})
    np.testing.assert_array_equal(example.input_ids, plain.input_ids)
    turns = np.cumsum(np.diff(plain.loss_weights, prepend=0) > 0)  # counts the assistant's turns from 1
    first = np.flatnonzero((turns == 1) & (plain.loss_weights > 0))
    expected = plain.loss_weights.copy()
    expected[first] *= weight
    np.testing.assert_array_equal(example.loss_weights, expected)
    assert tok.decode(plain.input_ids[first]) == "Paris<|im_end|>"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [CHAT[0], CHAT[1] | {"weight": 0.5}, *SECOND]},
        {"prompt": "What", "completion": "Paris"},
        {"instruction": "What", "output": "Paris"},
        {"input_ids": [1, 2, 3], "loss_weights": [0, 0.5, 1]},
    ],
    ids=lambda row: "+".join(row),
)
def test_the_weight_of_a_row_multiplies_all_others(row):
    _, encode = chat_encoder()
    plain, weighted = encode(row), encode(row | {"weight": 0.25})
    np.testing.assert_array_equal(weighted.loss_weights, 0.25 * plain.loss_weights)
    _, encode = chat_encoder(split_turns=True)
    if "messages" in row:
        assert [float(each.loss_weights.max()) for each in encode(row | {"weight": 2}).items] == [1, 2]


def test_a_row_without_weight_is_a_bad_row():
    _, encode = chat_encoder()
    with pytest.raises(ValueError, match="no token of this row carries loss"):
        encode({"messages": CHAT, "weight": 0})
    with pytest.raises(ValueError, match="are too large"):
        encode({"messages": [CHAT[0], CHAT[1] | {"weight": 1e30}], "weight": 1e30})


def test_weights_count_in_a_completion_and_stay_out_of_the_template():
    tok = tokenizer(CHATML.replace("message['content']", "message['content'] + message.keys() | join"))
    row = {"prompt": CHAT[:1], "completion": [CHAT[1] | {"weight": 0}, *SECOND]}
    text = tok.decode(Encoder(tok)(row).input_ids)
    assert "weight" not in text and "Parisrolecontent" in text
    assert learned(tok, Encoder(tok)(row)) == "toolrolecontent<|im_end|>"


def test_weights_count_for_whole_turns_where_everything_is_trained():
    tok, encode = chat_encoder(loss_on="all")
    system = {"role": "system", "content": "You are helpful"}
    example = encode({"messages": [system, CHAT[0] | {"weight": 0.5}, CHAT[1] | {"weight": 0}, *SECOND]})
    halves = tok.decode(example.input_ids[example.loss_weights == 0.5])
    silent = tok.decode(example.input_ids[example.loss_weights == 0])
    assert halves == "<|im_start|>user\nWhat<|im_end|>\n"
    assert silent == "<|im_start|>assistant\nParis<|im_end|>\n"
    with pytest.raises(ValueError, match=r"messages\[1\].*weight cannot be applied"):
        Encoder(tokenizer(BY_INDEX), loss_on="all")({"messages": [CHAT[0], CHAT[1] | {"weight": 0}]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [CHAT[0] | {"weight": 1}, CHAT[1]]}, r"messages\[0\]: weight 1 on a turn of the user"),
        ({"prompt": CHAT + SECOND[:1], "completion": SECOND[1:]}, None),
        (
            {"prompt": [CHAT[0], CHAT[1] | {"train": True}, SECOND[0]], "completion": SECOND[1:]},
            r"messages\[1\]: weight 1 on a turn of the prompt",
        ),
        ({"messages": [CHAT[0], CHAT[1] | {"weight": 0}]}, "all weights are 0"),
        ({"messages": [CHAT[0], CHAT[1] | {"weight": -1}]}, r"messages\[1\]: weight must be true, false or a number"),
        ({"messages": [CHAT[0], CHAT[1] | {"weight": float("nan")}]}, "weight must be true, false or a number"),
        ({"messages": [CHAT[0], CHAT[1] | {"weight": "0"}]}, "weight must be true, false or a number"),
        ({"messages": [CHAT[0], CHAT[1] | {"train": "no"}]}, "train must be true, false or a number"),
        ({"messages": [CHAT[0], CHAT[1] | {"train": 10**400}]}, "train must be true, false or a number"),
        ({"messages": [CHAT[0], CHAT[1] | {"weight": 1, "train": False}]}, "weight and train contradict"),
        ({"messages": [CHAT[0], CHAT[1] | {"train_detail": [{"begin_offset": 0}]}]}, "train_detail is not supported"),
    ],
)
def test_weights_that_cannot_be_honoured_are_refused(row, message):
    _, encode = chat_encoder()
    if message is None:
        assert encode(row).loss_weights.any()
        return
    with pytest.raises(ValueError, match=message):
        encode(row)


SPEAKERS = {"user": "human", "assistant": "gpt"}


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_weights_count_alike_in_every_way_of_writing_a_conversation(loss_on):
    _, encode = chat_encoder(loss_on=loss_on)
    rng = np.random.default_rng(0)
    for _ in range(50):
        talk = [{"role": role, "content": str(rng.integers(1000))} for _ in range(2) for role in SPEAKERS]
        weights = [float(rng.choice([0, 0.25, 1, 3])) if rng.random() < 0.7 else None for _ in talk]
        if loss_on == "assistant":
            weights = [weight if number % 2 else 0.0 for number, weight in enumerate(weights)]
        weights[3] = weights[3] or 0.5
        keys = [str(rng.choice(["weight", "train", "loss", "loss_scale"])) for _ in talk]
        messages = [m | {key: w} for m, key, w in zip(talk, keys, weights, strict=True)]
        sharegpt = [{"from": SPEAKERS[m.pop("role")], "value": m.pop("content")} | m for m in map(dict, messages)]
        ways = [
            {"conversations": sharegpt},
            {"messages": json.dumps(messages)},
            {"conversations": json.dumps(sharegpt), "tools": "", "system": None},
            {"prompt": messages[:1], "completion": messages[1:]},
            {"prompt": json.dumps(sharegpt[:1]), "completion": json.dumps(messages[1:])},
        ]
        expected = encode({"messages": messages})
        assert set(np.unique(expected.loss_weights)) <= {0, 1, *(w for w in weights if w is not None)}
        for way in ways:
            np.testing.assert_array_equal(encode(way)[:2], expected[:2])
