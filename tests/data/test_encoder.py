"""A recipe's encoder may read columns from elsewhere, by the number of the row."""

import numpy as np

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.encoder import RowEncoder
from jaxtrain.data.pipeline import TrainStream
from jaxtrain.types import Example


class Numbered(RowEncoder):
    fingerprint = "numbered"

    def __init__(self):
        self.noted = []

    def more_columns(self, source, row):
        return {"number": row, "of": len(source)}

    def note_ignored(self, row, source):
        self.noted.append(row)

    def prompt(self, row):
        raise ValueError("no prompts")

    question = prompt

    def __call__(self, row):
        return Example(np.array([1, row["a"], row["number"], row["of"]], np.int32), np.ones(4, np.float32))


def test_columns_of_a_rows_number():
    section = DataSection(train=SourceSection(rows=[{"a": 7}, {"a": 8}, {"a": 9}], epochs=1), max_length=4)
    encode = Numbered()
    with TrainStream(section.train_sources, section, encode, rows=1, seed=0, shards=[0], num_shards=1) as batches:
        rows = sorted(batch.tokens[0].tolist() for batch in batches)
    assert rows == [[1, 7, 0, 3], [1, 8, 1, 3], [1, 9, 2, 3]]
    assert {"a": 7} in encode.noted  # without the added columns
