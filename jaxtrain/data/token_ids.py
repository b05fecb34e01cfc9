"""Pre-tokenised rows: `input_ids` with what goes beside them, one value per token."""

from __future__ import annotations

import numpy as np

from jaxtrain.data.columns import LARGEST_WEIGHT, Row
from jaxtrain.data.packing import Example

IGNORED_LABEL = -100

_MASKS = ("completion_mask", "assistant_masks")  # 1 where the token is trained, as TRL writes them
_LARGEST = np.iinfo(np.int32).max


def from_token_ids(row: Row) -> Example:
    """The example of a row with `input_ids`.

    A token is trained where `labels` is not -100 and every mask that is given is 1, with its weight of `loss_weights`
    (default: 1). Tokens that `attention_mask` marks as padding, at either end, are left out.

    Raises ValueError for values that are not token ids, for columns of different lengths, for padding between tokens,
    and for a weight on a token that another column excludes.
    """
    ids = _integers(row, "input_ids")
    wrong = np.flatnonzero((ids < 0) | (ids > _LARGEST))
    if len(wrong):
        raise ValueError(f"input_ids[{wrong[0]}]: {ids[wrong[0]]} is not a token id")
    trained = np.ones(len(ids), bool)
    if row.get("labels") is not None:
        labels = _integers(row, "labels", len(ids))
        trained = labels != IGNORED_LABEL
        wrong = np.flatnonzero(trained & (labels != ids))
        if len(wrong):
            at = wrong[0]
            raise ValueError(
                f"labels[{at}] is {labels[at]}, which must be input_ids[{at}] ({ids[at]}) or {IGNORED_LABEL}"
            )
    for column in _MASKS:
        if row.get(column) is not None:
            trained &= _mask(row, column, len(ids))
    real, attended = slice(None), np.ones(len(ids), bool)
    if row.get("attention_mask") is not None:
        attended = _mask(row, "attention_mask", len(ids))
        places = np.flatnonzero(attended)
        real = slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)
        if len(places) != len(ids[real]):
            raise ValueError("attention_mask marks padding between tokens: only padding at the ends can be left out")
    weights = trained.astype(np.float32)
    if row.get("loss_weights") is not None:
        weights = _weights(row["loss_weights"], len(ids))
        wrong = np.flatnonzero((weights > 0) & ~(trained & attended))
        if len(wrong):
            raise ValueError(
                f"loss_weights[{wrong[0]}] is {weights[wrong[0]]:g}, and another column (labels, a mask or the "
                "attention mask) excludes this token: make it 0, or leave the other column out"
            )
    return Example(ids[real].astype(np.int32), weights[real])


def _weights(given: object, length: int) -> np.ndarray:
    """`loss_weights` [length] float32."""
    values = np.array(given if isinstance(given, list | np.ndarray) else None)
    if values.ndim != 1 or values.dtype.kind not in "iubf":
        raise ValueError("loss_weights must be a list of numbers")
    if len(values) != length:
        raise ValueError(f"loss_weights: {len(values)} of them for {length} input_ids")
    wrong = np.flatnonzero(~((values >= 0) & (values < LARGEST_WEIGHT)))
    if len(wrong):
        raise ValueError(f"loss_weights[{wrong[0]}] is {values[wrong[0]]}: a weight is a number that is not negative")
    return values.astype(np.float32)


def _mask(row: Row, column: str, length: int) -> np.ndarray:
    values = _integers(row, column, length)
    wrong = np.flatnonzero((values != 0) & (values != 1))
    if len(wrong):
        raise ValueError(f"{column}[{wrong[0]}] is {values[wrong[0]]}: a mask holds 0 and 1")
    return values == 1


def _integers(row: Row, column: str, length: int | None = None) -> np.ndarray:
    """A column as integers [n], of any size. Raises ValueError where it is none, or has not `length` of them."""
    given = row[column]
    if not isinstance(given, list | np.ndarray):
        raise ValueError(f"{column} must be a list of integers")
    try:
        values = np.array(given)
    except ValueError:  # lists of different lengths
        values = np.array(None)
    kinds = "iu" if column in ("input_ids", "labels") else "iub"
    if values.ndim == 1 and values.dtype.kind not in kinds and all(type(value) is int for value in given):
        values = np.array(given, object)  # integers beyond 64 bits, of which numpy makes floats
    elif values.ndim != 1 or values.dtype.kind not in kinds:
        raise ValueError(f"{column} must be a list of integers")
    if length is not None and len(values) != length:
        raise ValueError(f"{column}: {len(values)} of them for {length} input_ids")
    return values
