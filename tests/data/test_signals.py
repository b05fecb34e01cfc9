"""A signal belongs to its token wherever the token goes: through cutting, packing, evaluation, files and resuming."""

import itertools
import json

import numpy as np
import pytest

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.packing import RowExamples
from jaxtrain.data.pipeline import TrainStream, eval_batches
from jaxtrain.train.guard import NonFiniteError, check_finite
from jaxtrain.train.step import StepReport
from jaxtrain.types import Batch, Example

T = 32


def scalar(tokens):
    return (np.asarray(tokens) * 0.5).astype(np.float32)


def vector(tokens):
    return np.stack([np.asarray(tokens) + 1, np.asarray(tokens) * 3], -1).astype(np.int32)


def example(ids):
    ids = np.array(ids, np.int32)
    return Example(ids, np.ones(len(ids), np.float32), {"scalar": scalar(ids), "vector": vector(ids)})


def single(row):
    return example(row["input_ids"])


def prompted(row):
    found = example(row["input_ids"])
    found.loss_weights[: -min(len(row["input_ids"]) // 2, 12)] = 0
    return found


def pair(row):
    middle = max(len(row["input_ids"]) // 2, 2)
    return example(row["input_ids"][:middle]), example([*row["input_ids"][middle:], 7, 8])


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    lines = [{"input_ids": rng.integers(5, 500, rng.integers(4, 90)).tolist()} for _ in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SourceSection(path=str(path), epochs=1)


def stream(source, encode, **data):
    section = DataSection(train=source, max_length=T, packing_bins=3, **data)
    size = 2 if encode is pair else 1
    return TrainStream([source], section, encode, rows=4, seed=0, shards=range(4), num_shards=4, bundle_size=size)


def check(batch):
    real = batch.segment_ids > 0
    assert batch.signals["scalar"].dtype == np.float32 and batch.signals["vector"].dtype == np.int32
    np.testing.assert_array_equal(batch.signals["scalar"], scalar(batch.tokens) * real)
    np.testing.assert_array_equal(batch.signals["vector"], vector(batch.tokens) * real[..., None])


CASES = [
    (single, {}),
    (single, {"overlong": "split"}),
    (single, {"packing": False}),
    (prompted, {"overlong": "keep_completion"}),
    (pair, {}),
    (pair, {"overlong": "drop"}),
    (pair, {"packing": False}),
]


@pytest.mark.parametrize(("encode", "data"), CASES)
def test_signals_stay_with_their_tokens_everywhere(source, tmp_path, encode, data):
    with stream(source, encode, **data) as batches:
        whole = list(batches)
        assert len(whole) > 4 and batches.stats["examples"] > 20
    assert not whole[-1].segment_ids.all()  # with rows of padding
    for batch in whole:  # cut and packed
        check(batch)

    section = DataSection(train=source, max_length=T, **data)
    size = 2 if encode is pair else 1
    for batch in eval_batches([source], section, encode, rows=4, bundle_size=size):  # evaluated
        assert batch.tokens.shape == (4, T * size)
        check(batch)

    report = StepReport(*(3 if name == "skipped_in_a_row" else 0 for name in StepReport._fields))
    shorter = whole[1].map(lambda array: array[:2])
    with pytest.raises(NonFiniteError):  # written for inspection
        check_finite(report, [whole[0], shorter], 3, 5, tmp_path)
    (file,) = tmp_path.glob("*.npz")
    with np.load(file) as saved:
        arrays = dict(saved)
    assert arrays.pop("rows").tolist() == [4, 2]
    for index, given in enumerate([whole[0], shorter]):
        read = Batch.from_arrays({name: array[index] for name, array in arrays.items()})
        check(read)
        np.testing.assert_array_equal(read.tokens[: len(given.tokens)], given.tokens)

    with stream(source, encode, **data) as before:  # resumed
        list(itertools.islice(before, 3))
        state = json.loads(json.dumps(before.get_state()))
    with stream(source, encode, **data) as after:
        after.set_state(state)
        for batch, expected in zip(after, whole[3:], strict=True):
            assert batch.arrays().keys() == expected.arrays().keys()
            assert all(np.array_equal(array, expected.arrays()[name]) for name, array in batch.arrays().items())


def test_pairs_are_neighbours_in_one_row_and_numbered_from_one(source):
    with stream(source, pair) as batches:
        for batch in batches:
            assert batch.tokens.shape == (4, 2 * T)
            for segments, bundles in zip(batch.segment_ids, batch.bundle_ids, strict=True):
                np.testing.assert_array_equal(bundles, (segments + 1) // 2)
                assert segments.max() % 2 == 0


@pytest.mark.parametrize(
    ("encode", "data", "message"),
    [
        (pair, {"overlong": "split"}, r"data\.overlong=split would cut"),
        (lambda row: pair(row)[:1], {}, r"a\.jsonl:1: it makes 1 examples where 2 are read together"),
        (single, {}, r"a\.jsonl:1: it makes 1 examples where 2 are read together"),
        (lambda row: (single(row), Example(*single(row)[:2])), {}, r"a\.jsonl:1: its signals are"),
    ],
)
def test_bundles_that_do_not_fit_are_named(source, encode, data, message):
    section = DataSection(train=source, max_length=T, **data)
    with pytest.raises(ValueError, match=message):
        TrainStream([source], section, encode, rows=1, seed=0, shards=[0], num_shards=1, bundle_size=2)


def test_an_example_with_other_signals_is_a_bad_row(source):
    def encode(row):
        return single(row) if len(row["input_ids"]) < 60 else Example(*single(row)[:2])

    with stream(source, encode) as batches, pytest.raises(ValueError, match=r"a\.jsonl:\d+: .*those of other examples"):
        list(batches)


def test_padding_has_the_signals_though_the_first_rows_are_bad(source):
    calls = itertools.count()

    def encode(row):
        if next(calls) < 3 or len(row["input_ids"]) > 80:
            raise ValueError("no")
        return single(row)

    with pytest.warns(UserWarning, match="no"), stream(source, encode, on_bad_row="skip") as batches:
        everything = list(batches)
    assert not everything[-1].segment_ids.all()
    for batch in everything:
        check(batch)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_padding_has_the_signals_though_the_first_rows_make_no_example(source, on_bad_row):
    calls = itertools.count()

    def encode(row):
        return RowExamples([], ("equal_pairs",)) if next(calls) < 3 else single(row)

    with stream(source, encode, on_bad_row=on_bad_row) as batches:
        everything = list(batches)
    assert not everything[-1].segment_ids.all()
    for batch in everything:
        check(batch)
