import pytest

from jaxtrain.data.columns import check_columns, kind_of, rename_columns

CHAT = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "Paris"}]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "x", "messages": CHAT, "input_ids": [1]}, "input_ids"),
        ({"text": "x", "messages": CHAT, "input_ids": None}, "messages"),
        ({"text": "x", "messages": None, "conversations": CHAT}, "text"),
        ({"messages": None, "conversations": CHAT}, "messages"),
        ({"messages": None, "prompt": "a", "completion": "b"}, "prompt+completion"),
        ({"prompt": None, "completion": "b"}, "prompt+completion"),  # so that the error names the null
        ({"text": None}, "text"),
    ],
)
def test_null_columns_do_not_decide_what_a_row_is(row, kind):
    assert kind_of(row) == kind


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"input_ids": [1, 2], "loss_mask": [0, 1]}, "input_ids"),
        ({"input_ids": [1, 2], "position_ids": [0, 0]}, "input_ids"),
        ({"input_ids": [1, 2], "seq_lengths": [1, 1]}, "input_ids"),
        ({"input_ids": [1, 2], "token_type_ids": [0, 1]}, "input_ids"),
        ({"messages": CHAT, "images": ["a.png"]}, "messages"),
        ({"conversations": CHAT, "system": "You are"}, "messages"),
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
            {"input_ids": [1, 2], "position_ids": [0, 1], "token_type_ids": [0, 0], "tools": [{"name": "f"}]},
            "input_ids",
        ),
        ({"messages": CHAT, "images": [], "system": "", "loss_mask": [1], "labels": 3}, "messages"),
        ({"text": "x", "tools": None, "label": 1, "anything": "else"}, "text"),
    ],
)
def test_columns_that_change_nothing_are_not(row, kind):
    check_columns(row, kind)


def test_a_map_of_columns_chooses_the_kind_and_what_goes_beside_it():
    row = {"ids": [1], "labels": [1], "loss_mask": [1], "messages": CHAT, "tools": [], "chat": CHAT, "system": "x"}
    assert rename_columns(row, {"input_ids": "ids"}) == {"input_ids": [1], "labels": [1], "loss_mask": [1]}
    assert rename_columns(row, {"messages": "chat"}) == {"messages": CHAT, "tools": [], "system": "x"}
    assert rename_columns(row, {"tools": "tools"}) == row
