"""The columns of a training row: the kind of example that they make, what may accompany them, what is refused or
ignored.

The names are TRL's and, of instructions, Alpaca's. A column that is null counts as absent.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

Row = dict[str, Any]

FORMATS = {  # the columns of each kind of example, in the order in which they are looked for
    "input_ids": ("input_ids",),
    "messages": ("messages",),
    "prompt+completion": ("prompt", "completion"),
    "instruction+output": ("instruction", "output"),
    "text": ("text",),
    "chosen+rejected": ("chosen", "rejected"),
}
# One value per token of input_ids.
TOKEN_COLUMNS = ("labels", "completion_mask", "assistant_masks", "attention_mask", "loss_weights")
# A first message, and arguments of the chat template. `functions` is OpenAI's old name of `tools`.
TEMPLATE_COLUMNS = ("system", "tools", "functions", "chat_template_kwargs")
WEIGHT = "weight"  # of all tokens of the row that are trained
OPTIONAL_COLUMNS = {  # by kind of example
    "input_ids": (*TOKEN_COLUMNS, WEIGHT),
    "messages": (*TEMPLATE_COLUMNS, WEIGHT),
    "prompt+completion": (*TEMPLATE_COLUMNS, WEIGHT),
    "instruction+output": ("input", "history", *TEMPLATE_COLUMNS, WEIGHT),
    "text": (WEIGHT,),
    "chosen+rejected": ("prompt", "messages", "conversations", "instruction", "input", "history", *TEMPLATE_COLUMNS),
}
# Of recipes preference and reward, beside the columns of any kind: no map of columns leaves them out.
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "ref_logps")
REFERENCE_COLUMNS += tuple(name.replace("_logps", "_KL_logps") for name in REFERENCE_COLUMNS)
LABEL_COLUMNS = ("label", "completions", "labels")
_ANSWER_COLUMNS = ("margin", *REFERENCE_COLUMNS, *LABEL_COLUMNS)
LARGEST_WEIGHT = 3e38  # weights are float32
_TEXT_ONLY = dict.fromkeys(
    ("images", "image", "videos", "video", "audios", "audio", "pixel_values"), "only text is supported"
)
_UNPACKED = "write each packed sequence as a separate row"
_ROW_WEIGHT = "the weight of a row is the column `weight`"
_OTHER_WEIGHTS = {
    **dict.fromkeys(("loss_weight", "sample_weight", "example_weight", "loss_scale"), _ROW_WEIGHT),
    **dict.fromkeys(
        ("mask", "masks", "loss_mask", "train_mask", "mask_history"),
        "which turns of a conversation are trained is set by a `weight` in each message; data.loss_on=last trains the "
        "last one alone",
    ),
}
_NOT_TRAINED = dict.fromkeys(("train", "loss"), f"{_ROW_WEIGHT}, 0 for one that is not trained")
_OF_CHATS = {
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "the thought of an answer belongs in its message, as `reasoning_content`, or at the beginning of its text",
    ),
    "train_on_inputs": "set data.loss_on=all to train prompts too",
    "documents": "documents for a chat template belong in chat_template_kwargs",
}
_OF_ALPACA = {
    "input": "it goes with the columns instruction and output; write it into the prompt",
    "history": "it goes with the columns instruction and output; write the conversation as messages",
}
_PROMPT_LENGTHS = dict.fromkeys(
    ("prompt_length", "prompt_len", "source_length", "source_len", "completion_start"),
    "write which tokens are trained as `completion_mask`",
)
UNSUPPORTED_COLUMNS = {  # columns with a known meaning that is not implemented, by kind of example: refused by name
    "input_ids": {
        "position_ids": f"positions start at 0 in every row; {_UNPACKED}",
        "seq_lengths": _UNPACKED,
        "segment_ids": _UNPACKED,
        "loss_mask": "its alignment differs between tools; write it as `completion_mask` (0 and 1) or `loss_weights`, "
        "where t is for input_ids[t]",
        **dict.fromkeys(("loss_weight", "sample_weight", "example_weight", "loss_scale"), _ROW_WEIGHT),
        "token_type_ids": "models here have no token types",
        **_PROMPT_LENGTHS,
        **_NOT_TRAINED,
        **_TEXT_ONLY,
    },
    **{
        kind: {
            **(_OF_ALPACA if kind in ("messages", "prompt+completion") else {}),
            **(_OF_CHATS if kind != "text" else {}),
            **_TEXT_ONLY,
            **_OTHER_WEIGHTS,
            **_NOT_TRAINED,
        }
        for kind in FORMATS
        if kind != "input_ids"
    },
}
_KNOWN_COLUMNS = {kind: {*FORMATS[kind], *OPTIONAL_COLUMNS[kind], *UNSUPPORTED_COLUMNS[kind]} for kind in FORMATS}
COLUMNS = tuple(
    dict.fromkeys(
        (
            *(name for part in (FORMATS, OPTIONAL_COLUMNS) for names in part.values() for name in names),
            *_ANSWER_COLUMNS,
        )
    )
)
# By a chat template. Tools come first: they say which arguments a call has.
RENDERED_COLUMNS = (*TEMPLATE_COLUMNS, "messages", "conversations", "prompt", "completion", "chosen", "rejected")


def rename_columns(row: Row, columns: dict[str, str]) -> Row:
    """`row` under our names. A map also selects the kind of example where a row could be several.

    Columns of the other kinds and columns without a known meaning are then left out.
    """
    mapped = {ours: row[theirs] for ours, theirs in columns.items()}
    others = {name: value for name, value in row.items() if name not in columns.values()}
    meant = [kind for kind, names in FORMATS.items() if mapped.keys() & set(names)]
    if not meant:
        return others | mapped
    kept = {name for kind in meant for name in (*FORMATS[kind], *OPTIONAL_COLUMNS[kind], *UNSUPPORTED_COLUMNS[kind])}
    kept |= {name for name in _ANSWER_COLUMNS if name != "labels" or "completions" in row}  # else it is of tokens
    if "input_ids" in meant:
        kept |= {name for name, value in others.items() if _weighs_tokens(name, value)}
    return {name: value for name, value in others.items() if name in kept} | mapped


def row_format(row: Row) -> str:
    """Which of `FORMATS` a row is, ShareGPT's `conversations` included. Raises ValueError where it is none."""
    present = frozenset([column for column, value in row.items() if value is not None])
    kind = _format_of(present) or _format_of(frozenset(row))  # the type check of a null column names it
    if kind is not None:
        return kind
    raise ValueError(
        f"no columns to train on: this row has {', '.join(map(repr, row)) or 'none'}, and needs one of "
        f"{', '.join(FORMATS)}; name them with data.train.columns, e.g. {{prompt: question, completion: answer}}"
    )


@lru_cache(maxsize=256)
def _format_of(names: frozenset[str]) -> str | None:
    for kind, columns in FORMATS.items():
        if names.issuperset(columns) or (kind == "messages" and "conversations" in names):
            return kind
    return None


def from_alpaca(row: Row) -> Row:
    """A row of "instruction+output", with the columns that it stands for: `prompt` and `completion`, or `messages`.

    The input follows the instruction on a separate line, as in LLaMA-Factory and ms-swift. A `history` of questions
    and answers makes it a conversation. Raises ValueError.
    """
    for column in ("instruction", "input", "output"):
        if not isinstance(row.get(column), str | None):
            raise ValueError(f"{column} must be a string, not {type(row[column]).__name__}")
    prompt = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    history = row.get("history") or []
    if not history:
        return row | {"prompt": prompt, "completion": row["output"]}
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("history must be a list of pairs: a question and its answer")
    pairs = [*history, (prompt, row["output"])]
    turns = [turn for pair in pairs for turn in zip(("user", "assistant"), pair, strict=True)]
    return row | {"messages": [{"role": role, "content": content} for role, content in turns]}


def row_weight(row: Row) -> float:
    """The loss weight of all trained tokens of a row: its column `weight`, a number or its text, else 1."""
    value = row.get(WEIGHT)
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value) if isinstance(value, str | bool | int | float) else math.nan
    except (ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < LARGEST_WEIGHT:
        raise ValueError(
            f"the column 'weight' is the loss weight of the row, a number that is not negative, and not {value!r:.40}; "
            + left_out_by_map(WEIGHT)
        )
    return weight


def reference_answer(row: Row) -> Any:
    """The answer in verl's `reward_model` or Alpaca's `output`; None where the row has an `answer`, or neither."""
    if row.get("answer") is not None:
        return None
    verl = row.get("reward_model")
    if isinstance(verl, dict) and verl.get("ground_truth") is not None:
        return verl["ground_truth"]
    return row.get("output") if row.get("prompt") is None and row.get("instruction") is not None else None


def ignored_columns(row: Row) -> list[str]:
    """The columns that hold something and are not read: those of other kinds of example, and unknown ones."""
    kind = row_format(row)
    known = _KNOWN_COLUMNS[kind]
    if kind == "messages" and row.get("messages") is None:
        known = known | {"conversations"}
    other = [name for name in _NOT_TRAINED if row.get(name) not in (None, "", []) and _truth(row[name]) is None]
    return [
        column
        for column, value in row.items()
        if column in other or not (column in known or _changes_nothing(column, value))
    ]


def check_columns(row: Row, kind: str) -> None:
    """Raises ValueError for a column with a known meaning that an example of this kind would ignore.

    `kind` is one of `FORMATS`; "text" also stands for a prompt and a completion that are joined as they are.
    """
    unsupported = UNSUPPORTED_COLUMNS[kind]
    for column, value in row.items():
        if column in unsupported and not _changes_nothing(column, value):
            raise ValueError(
                f"the column {column!r} is not supported: {unsupported[column]}; {left_out_by_map(column)}"
            )
    if kind == "input_ids":  # tools and template arguments have been rendered already
        for column, value in row.items():
            if _weighs_tokens(column, value):
                raise ValueError(
                    f"the column {column!r} is not supported: write which tokens are trained as `labels`, "
                    "`completion_mask` or `assistant_masks`, and other weights as `loss_weights`, where t is for "
                    f"input_ids[t]; {left_out_by_map(column)}"
                )
        return
    for column in TOKEN_COLUMNS:
        if isinstance(row.get(column), list):
            raise ValueError(
                f"the column {column!r} goes with `input_ids`, which this row does not have; {left_out_by_map(column)}"
            )
    for column in TEMPLATE_COLUMNS if kind == "text" else ():
        if column in row and not _changes_nothing(column, row[column]):
            raise ValueError(
                f"the column {column!r} is for a chat template, which plain text does not use: "
                + left_out_by_map(column)
            )
    if kind == "text" and row_format(row) == "instruction+output" and row.get("history"):
        raise ValueError("the column 'history' needs a chat template: use data.prompt_format=chat")


def left_out_by_map(column: str) -> str:
    """What to do about a column of another meaning, for an error."""
    return f"data.train.columns={{{column}: null}} leaves out a column of another meaning"


def _weighs_tokens(column: str, value: Any) -> bool:
    """Whether a column looks like a mask or weights of tokens under a name that is not ours.

    Where such a column is ignored, every token is trained.
    """
    if not isinstance(value, list) or not value or column in (*TOKEN_COLUMNS, "special_tokens_mask"):
        return False
    name = f"_{column.lower()}"
    return any(part in name for part in ("mask", "weight", "loss", "label", "target", "_train"))  # no "constraints"


def _truth(value: Any) -> bool | None:
    """What a flag says, also one that is text, as in CSV; None for a value that is no flag."""
    return {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}.get(str(value).lower())


def _changes_nothing(column: str, value: Any) -> bool:
    """Whether a column may be ignored: null, empty, or the values that it has where it is not needed."""
    if column == "position_ids" and isinstance(value, list):
        return value == list(range(len(value)))
    if column == "token_type_ids" and isinstance(value, list):
        return not any(value)
    if column in _NOT_TRAINED and not isinstance(value, list):
        return _truth(value) is not False
    if column == "train_on_inputs" and value is False:
        return True
    return value is None or value == "" or value == [] or value == {}
