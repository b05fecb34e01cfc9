"""What the first batch of a run trains on, as text, for its report."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.data.tokens import runs_of_weight
from jaxtrain.observe.run_files import FIRST_ROWS
from jaxtrain.session.record import write_atomically
from jaxtrain.types import Batch

_MAX_SEGMENTS = 8
_MAX_TOKENS = 1000  # of a segment


def write_first_rows(folder: Path, batch: Batch, tokenizer: Any) -> None:
    """Write the first segments of a batch of process 0: each a list of runs of tokens, (text, loss weight).

    Without a tokenizer the text is token ids.
    """
    if jax.process_index() == 0:
        segments = [list(_runs(*each, tokenizer)) for each in itertools.islice(_segments(batch), _MAX_SEGMENTS)]
        write_atomically(folder / FIRST_ROWS, json.dumps(segments))


def _segments(batch: Batch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens and loss weights of each segment."""
    for tokens, ids, weights in zip(batch.tokens, batch.segment_ids, batch.loss_weights, strict=True):
        for number in range(1, int(np.max(ids)) + 1):
            (places,) = np.nonzero(ids == number)
            yield np.asarray(tokens)[places[:_MAX_TOKENS]], np.asarray(weights)[places[:_MAX_TOKENS]]


def _runs(tokens: np.ndarray, weights: np.ndarray, tokenizer: Any) -> Iterator[tuple[str, float]]:
    for run, weight in runs_of_weight(weights):
        ids = tokens[run].tolist()
        text = "".join(f"{token} " for token in ids) if tokenizer is None else tokenizer.decode(ids)
        yield text, weight
