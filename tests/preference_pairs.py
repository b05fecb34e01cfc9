"""Packed preference pairs with random scores."""

import numpy as np

from jaxtrain.types import Batch

PAIRS = [(3, 5), (4, 2), (6, 1), (2, 2), (1, 7)]
ROW = 24


def packed(rows_of_pairs, seed=0):
    """Rows of pairs, each answer after one prompt token of weight 0; and the answers' scores by pair."""
    rng = np.random.default_rng(seed)
    shape = len(rows_of_pairs), ROW
    arrays = {name: np.zeros(shape, np.int32) for name in ("segment_ids", "bundle_ids", "sign")}
    weights, logp, ref = (np.zeros(shape, np.float32) for _ in range(3))
    answers = []
    for row, pairs in enumerate(rows_of_pairs):
        at, segment = 0, 0
        for number, pair in enumerate(pairs, 1):
            sides = []
            for sign, size in zip((1, -1), PAIRS[pair], strict=True):
                draw = np.random.default_rng([seed, pair, sign + 1])
                place, own = slice(at, at + size + 1), slice(at + 1, at + size + 1)
                segment += 1
                arrays["segment_ids"][row, place] = segment
                arrays["bundle_ids"][row, place] = number
                arrays["sign"][row, place] = sign
                weights[row, own] = 1
                logp[row, own], ref[row, own] = -draw.exponential(size=(2, size)) - 0.05
                sides.append((logp[row, own].astype(np.float64), ref[row, own].astype(np.float64)))
                at += size + 1
            answers.append(sides)
    ids = rng.integers(1, 9, shape).astype(np.int32)
    signals = {"sign": arrays["sign"], "ref_logps": ref}
    batch = Batch(ids, ids, arrays["segment_ids"], weights, signals, arrays["bundle_ids"])
    return batch, logp, answers


def sigmoid(x):
    return 1 / (1 + np.exp(-x))
