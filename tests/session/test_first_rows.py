"""The first rows of a run as text."""

import json

import numpy as np
import tiny

from jaxtrain.session.first_rows import write_first_rows


class Letters:
    def decode(self, ids):
        return "".join(chr(96 + number) for number in ids)


def test_segments_are_runs_of_equal_weight(tmp_path):
    batch = tiny.packed_batch([[4, 3], [2]], 16)
    tokens, weights = np.array(batch.tokens), np.zeros(np.shape(batch.tokens), np.float32)
    tokens[0, :7], tokens[1, :2] = range(1, 8), (25, 26)
    weights[0, 2:4], weights[0, 6], weights[1, :2] = 1, 0.5, 1
    batch = batch._replace(tokens=tokens, loss_weights=weights)
    write_first_rows(tmp_path, batch, Letters())
    expected = [[["ab", 0], ["cd", 1]], [["ef", 0], ["g", 0.5]], [["yz", 1]]]
    assert json.loads((tmp_path / "first_rows.json").read_text()) == expected
    write_first_rows(tmp_path, batch, None)
    assert json.loads((tmp_path / "first_rows.json").read_text())[2] == [["25 26 ", 1]]
