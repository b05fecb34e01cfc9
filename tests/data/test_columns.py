import math

import pytest

from jaxtrain.data.columns import (
    check_columns,
    from_alpaca,
    ignored_columns,
    reference_answer,
    rename_columns,
    row_format,
    row_weight,
)

CHAT = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "Paris"}]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "x", "messages": CHAT, "input_ids": [1]}, "input_ids"),
        ({"text": "x", "messages": CHAT, "input_ids": None}, "messages"),
        ({"text": "x", "messages": None, "conversations": CHAT}, "messages"),
        ({"messages": None, "conversations": CHAT}, "messages"),
        ({"messages": None, "prompt": "a", "completion": "b"}, "prompt+completion"),
        ({"prompt": None, "completion": "b"}, "prompt+completion"),  # so that the error names the null
        ({"text": None}, "text"),
    ],
)
def test_null_columns_do_not_decide_what_a_row_is(row, kind):
    assert row_format(row) == kind


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"input_ids": [1, 2], "loss_mask": [0, 1]}, "input_ids"),
        ({"input_ids": [1, 2], "position_ids": [0, 0]}, "input_ids"),
        ({"input_ids": [1, 2], "seq_lengths": [1, 1]}, "input_ids"),
        ({"input_ids": [1, 2], "token_type_ids": [0, 1]}, "input_ids"),
        ({"messages": CHAT, "images": ["a.png"]}, "messages"),
        ({"messages": CHAT, "mask": "User"}, "messages"),
        ({"messages": CHAT, "loss_mask": [1, 0]}, "messages"),
        ({"prompt": "a", "completion": "b", "sample_weight": 2}, "prompt+completion"),
        ({"text": "a", "loss_weight": 2}, "text"),
        ({"text": "a", "loss_weights": [1.0]}, "text"),
        ({"text": "a", "functions": [{"name": "f"}]}, "text"),
        ({"input_ids": [1, 2], "loss_weight": 2}, "input_ids"),
        ({"input_ids": [1, 2], "assistant_mask": [0, 1]}, "input_ids"),
        ({"input_ids": [1, 2], "Response_Mask": [0, 1]}, "input_ids"),
        ({"input_ids": [1, 2], "token_weights": [0, 1.5]}, "input_ids"),
        ({"input_ids": [1, 2], "target_ids": [2, 3]}, "input_ids"),
        ({"text": "x", "system": "You are"}, "text"),
        ({"instruction": "x", "output": "y", "history": [["a", "b"]]}, "text"),
        ({"text": "x", "tools": [{"name": "f"}]}, "text"),
        ({"text": "x", "attention_mask": [1]}, "text"),
        ({"messages": CHAT, "completion_mask": [1]}, "messages"),
    ],
)
def test_columns_that_would_be_ignored_are_refused_by_name(row, kind):
    with pytest.raises(ValueError, match=f"the column '{list(row)[-1]}'"):
        check_columns(row, kind)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (
            {
                "input_ids": [1, 2],
                "position_ids": [0, 1],
                "token_type_ids": [0, 0],
                "weight": 2,
                "tools": [{"name": "f"}],
            },
            "input_ids",
        ),
        ({"messages": CHAT, "images": [], "system": "", "loss_mask": [], "labels": 3}, "messages"),
        ({"text": "x", "tools": None, "label": 1, "anything": "else"}, "text"),
    ],
)
def test_columns_that_change_nothing_are_not(row, kind):
    check_columns(row, kind)


CHAT_ROW = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        *((CHAT_ROW | {name: "x"}, "prompt+completion") for name in ("input", "reasoning_content", "thinking")),
        (CHAT_ROW | {"history": [["q", "a"]]}, "prompt+completion"),
        (CHAT_ROW | {"documents": [{"text": "x"}]}, "prompt+completion"),
        ({"messages": CHAT, "train": False}, "messages"),
        ({"text": "x", "loss": 0}, "text"),
        *((CHAT_ROW | {"train": flag}, "prompt+completion") for flag in ("0", "False", [0, 1])),  # text, as of CSV
        ({"input_ids": [1, 2], "is_trained": [0, 1]}, "input_ids"),
        ({"messages": CHAT, "train_on_inputs": True}, "messages"),
        ({"input_ids": [1, 2], "prompt_length": 1}, "input_ids"),
    ],
)
def test_columns_of_other_tools_that_would_change_what_is_trained_are_refused(row, kind):
    with pytest.raises(ValueError, match=f"the column '{list(row)[-1]}' is not supported"):
        check_columns(row, kind)


def test_columns_of_other_tools_that_say_what_is_done_anyway():
    check_columns({"input_ids": [1, 2], "constraints": [0, 1]}, "input_ids")
    check_columns({"messages": CHAT, "train": True, "loss": 2.5, "train_on_inputs": False}, "messages")
    check_columns({"instruction": "q", "input": "i", "history": [["q", "a"]], "output": "a"}, "instruction+output")


def test_a_map_of_columns_chooses_the_kind_and_what_goes_beside_it():
    row = {"ids": [1], "labels": [1], "loss_mask": [1], "messages": CHAT, "tools": [], "chat": CHAT, "system": "x"}
    assert rename_columns({"a": "x", "b": 1}, {"system": "a"}) == {"system": "x", "b": 1}
    row_with_mask = {"ids": [1], "train_mask": [1], "target": [0], "other": [1]}
    renamed = rename_columns(row_with_mask, {"input_ids": "ids", "completion_mask": "train_mask"})
    assert renamed == {"input_ids": [1], "completion_mask": [1], "target": [0]}  # `target` is then refused
    assert rename_columns(row, {"input_ids": "ids"}) == {"input_ids": [1], "labels": [1], "loss_mask": [1]}
    renamed = rename_columns(row, {"messages": "chat"})
    assert renamed == {"messages": CHAT, "tools": [], "system": "x", "loss_mask": [1]}  # `loss_mask` is then refused
    assert rename_columns(row, {"tools": "tools"}) == row


def test_alpacas_columns_are_a_prompt_and_a_completion():
    assert from_alpaca({"instruction": "a", "input": "b", "output": "c"})["prompt"] == "a\nb"
    for nothing in ({"input": None}, {"input": ""}, {}):
        row = from_alpaca({"instruction": "a", "output": "c", "history": []} | nothing)
        assert (row["prompt"], row["completion"]) == ("a", "c")
    row = from_alpaca({"instruction": "a", "input": "b", "output": "c", "history": [["q", "r"]]})
    assert [message["content"] for message in row["messages"]] == ["q", "r", "a\nb", "c"]
    for wrong, message in [({"input": 0}, "input must be a string, not int"), ({"history": ["q"]}, "a list of pairs")]:
        with pytest.raises(ValueError, match=message):
            from_alpaca({"instruction": "a", "output": "c"} | wrong)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"messages": CHAT, "id": 3, "source": "x", "url": None, "tags": []}, ["id", "source"]),
        ({"conversations": CHAT, "system": "x", "tools": "[]", "text": "rendered"}, ["text"]),
        ({"messages": CHAT, "conversations": CHAT}, ["conversations"]),
        ({"prompt": "a", "completion": "b", "label": False, "chosen": "c"}, ["label", "chosen"]),
        ({"instruction": "a", "input": "i", "output": "b", "text": "c"}, ["text"]),
        ({"text": "x", "train": "true", "loss": 0.7}, ["loss"]),
        ({"input_ids": [1, 2], "position_ids": [0, 1], "special_tokens_mask": [1, 0]}, ["special_tokens_mask"]),
        ({"input_ids": [1, 2], "constraints": [0, 1]}, ["constraints"]),
    ],
)
def test_columns_that_are_not_read_are_listed(row, names):
    assert ignored_columns(row) == names


@pytest.mark.parametrize(
    ("value", "weight"), [(None, 1), ("", 1), (2, 2), (0.25, 0.25), (True, 1), (False, 0), ("0.5", 0.5)]
)
def test_a_row_has_a_weight(value, weight):
    assert row_weight({"text": "a", "weight": value}) == weight
    assert ignored_columns({"text": "a", "weight": value}) == []


@pytest.mark.parametrize("value", [-1, "heavy", [1], math.nan, 10**400, 1e39])
def test_a_weight_of_another_meaning_is_refused(value):
    with pytest.raises(ValueError, match="the column 'weight' is the loss weight of the row"):
        row_weight({"text": "a", "weight": value})


def test_what_is_right_is_found_under_other_names():
    assert reference_answer({"prompt": [], "reward_model": {"style": "rule", "ground_truth": "72"}}) == "72"
    assert reference_answer({"answer": "1", "reward_model": {"ground_truth": "72"}}) is None
    assert reference_answer({"instruction": "a", "output": "b"}) == "b"
    assert reference_answer({"prompt": "a", "reward_model": "r"}) is None
