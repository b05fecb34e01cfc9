"""The columns of a training row: which kinds of example they make, which go beside them, which are refused.

The names are TRL's. A column that is null counts as absent.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

FORMATS = {  # the columns of each kind of example, in the order in which they are looked for
    "input_ids": ("input_ids",),
    "messages": ("messages",),
    "prompt+completion": ("prompt", "completion"),
    "text": ("text",),
}
TOKEN_COLUMNS = ("labels", "completion_mask", "assistant_masks", "attention_mask")  # one value per token of input_ids
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # arguments of the chat template
OPTIONAL_COLUMNS = {  # by kind of example
    "input_ids": TOKEN_COLUMNS,
    "messages": TEMPLATE_COLUMNS,
    "prompt+completion": TEMPLATE_COLUMNS,
    "text": (),
}
_TEXT_ONLY = dict.fromkeys(
    ("images", "image", "videos", "video", "audios", "audio", "pixel_values"), "only text is supported"
)
_SYSTEM = {"system": "write it as the first message, with the role `system`"}
_UNPACKED = "write each packed sequence as a row of its own"
UNSUPPORTED_COLUMNS = {  # columns with a known meaning that is not implemented, by kind of example: refused by name
    "input_ids": {
        "position_ids": f"positions start at 0 in every row; {_UNPACKED}",
        "seq_lengths": _UNPACKED,
        "segment_ids": _UNPACKED,
        "loss_mask": "its alignment differs between tools; write it as `completion_mask`, where t weighs input_ids[t]",
        "token_type_ids": "models here have no token types",
        **_TEXT_ONLY,
    },
    "messages": _SYSTEM | _TEXT_ONLY,
    "prompt+completion": _SYSTEM | _TEXT_ONLY,
    "text": _TEXT_ONLY,
}
COLUMNS = tuple(dict.fromkeys([*(c for names in FORMATS.values() for c in names), *TOKEN_COLUMNS, *TEMPLATE_COLUMNS]))
RENDERED_COLUMNS = ("messages", "conversations", "prompt", "completion", *TEMPLATE_COLUMNS)  # by a chat template


def rename_columns(row: Row, columns: dict[str, str]) -> Row:
    """`row` under our names. A map also says which kind of example is meant where a row could be several.

    Columns of the other kinds and columns without a known meaning are left out.
    """
    mapped = {ours: row[theirs] for ours, theirs in columns.items()}
    meant = [kind for kind, names in FORMATS.items() if mapped.keys() & set(names)]
    if not meant:
        return row | mapped
    kept = {name for kind in meant for name in (*FORMATS[kind], *OPTIONAL_COLUMNS[kind], *UNSUPPORTED_COLUMNS[kind])}
    return {name: value for name, value in row.items() if name in kept} | mapped


def kind_of(row: Row) -> str:
    """Which of `FORMATS` a row is, ShareGPT's `conversations` included. Raises ValueError where it is none."""
    for null_too in (False, True):  # the type check of a null column names it
        for kind, columns in FORMATS.items():
            if all(column in row if null_too else row.get(column) is not None for column in columns):
                return kind
        if "conversations" in row and (null_too or row["conversations"] is not None):
            return "messages"
    raise ValueError(
        f"no columns to train on: this row has {', '.join(map(repr, row)) or 'none'}, and needs one of "
        f"{', '.join(FORMATS)}; name them with data.train.columns, e.g. {{prompt: question, completion: answer}}"
    )


def check_columns(row: Row, kind: str) -> None:
    """Raises ValueError for a column with a known meaning that an example of this kind would ignore.

    `kind` is one of `FORMATS`; "text" also stands for a prompt and a completion that are joined as they are.
    """
    for column, reason in UNSUPPORTED_COLUMNS[kind].items():
        if not _changes_nothing(column, row.get(column)):
            raise ValueError(f"the column {column!r} is not supported: {reason}")
    if kind == "input_ids":  # tools and template arguments have been rendered already
        return
    for column in TOKEN_COLUMNS:
        if isinstance(row.get(column), list):
            raise ValueError(f"the column {column!r} goes with `input_ids`, which this row has not")
    for column in TEMPLATE_COLUMNS if kind == "text" else ():
        if not _changes_nothing(column, row.get(column)):
            raise ValueError(
                f"the column {column!r} is for a chat template, which plain text does not use: remove it, or choose "
                "the columns with data.train.columns, e.g. {text: text}"
            )


def _changes_nothing(column: str, value: Any) -> bool:
    """Whether a column may be ignored: null, empty, or the values that it has where it is not needed."""
    if column == "position_ids" and isinstance(value, list):
        return value == list(range(len(value)))
    if column == "token_type_ids" and isinstance(value, list):
        return not any(value)
    return value is None or value == "" or value == [] or value == {}
