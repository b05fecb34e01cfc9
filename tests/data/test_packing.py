import random

import numpy as np
import pytest

from jaxtrain.data.packing import BestFit, fit, make_row, signal_types, stack_rows
from jaxtrain.types import Example


def example(length, weights=None, first=1):
    weights = np.ones(length, np.float32) if weights is None else np.array(weights, np.float32)
    return Example(np.arange(first, first + length, dtype=np.int32), weights)


def pack(lengths, capacity, most_open):
    packer = BestFit(capacity, most_open)
    rows = [row for item, length in enumerate(lengths) if (row := packer.add(item, length)) is not None]
    while (row := packer.take()) is not None:
        rows.append(row)
    return rows


def log_normal(count, capacity):
    lengths = np.random.default_rng(0).lognormal(np.log(150), 1.0, count)
    return np.clip(lengths, 1, capacity).astype(int).tolist()


@pytest.mark.parametrize("most_open", [0, 1, 5, 64])
def test_every_item_is_packed_once_and_no_row_overflows(most_open):
    lengths = log_normal(2000, 512)
    rows = pack(lengths, 512, most_open)
    assert sorted(item for row in rows for item in row) == list(range(2000))
    assert max(sum(lengths[item] for item in row) for row in rows) <= 512
    assert most_open or all(len(row) == 1 for row in rows)


@pytest.mark.parametrize("most_open", [8, 16, 64])
def test_rows_of_skewed_lengths_are_denser_than_98_percent(most_open):
    lengths = log_normal(20_000, 4096)
    assert sum(lengths) / (4096 * len(pack(lengths, 4096, most_open))) > 0.98


def test_an_item_goes_where_it_fits_best():
    packer = BestFit(10, 4)
    for item, size in enumerate([5, 6, 4]):
        packer.add(item, size)
    assert packer.open_rows == [[0]]  # 6 + 4 filled a row
    packer.add(3, 7)
    packer.add(4, 3)
    assert packer.open_rows == [[0]]
    assert packer.add(5, 5) == [0, 5]


def test_a_packer_goes_on_from_its_open_rows():
    lengths = log_normal(500, 256)
    whole = pack(lengths, 256, 8)
    for cut in (1, 99, 250):
        packer = BestFit(256, 8)
        rows = [row for item in range(cut) if (row := packer.add(item, lengths[item])) is not None]
        resumed = BestFit(256, 8, [[(item, lengths[item]) for item in row] for row in packer.open_rows])
        rows += [row for item in range(cut, 500) if (row := resumed.add(item, lengths[item])) is not None]
        while (row := resumed.take()) is not None:
            rows.append(row)
        assert rows == whole


def test_a_row_holds_segments_from_1_with_restarted_positions():
    row = make_row([example(3, [0, 1, 1]), example(2, [0, 1], first=7)], 8)
    assert row.tokens.tolist() == [1, 2, 3, 7, 8, 0, 0, 0]
    assert row.segment_ids.tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert row.loss_weights.tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    assert row.bundle_ids.tolist() == row.segment_ids.tolist()
    assert {array.dtype for name, array in row.arrays().items() if name != "loss_weights"} == {np.dtype(np.int32)}
    assert row.loss_weights.dtype == np.float32
    assert not any(array.any() for array in make_row([], 4).arrays().values())


def test_rows_stack_to_a_batch():
    batch = stack_rows([make_row([example(3)], 4), make_row([], 4)])
    assert batch.tokens.tolist() == [[1, 2, 3, 0], [0, 0, 0, 0]]
    assert all(array.shape == (2, 4) for array in batch.arrays().values())


def test_the_first_token_of_a_segment_carries_no_weight():
    given = example(4)
    (piece,), event = fit(given, 4, "truncate")
    assert piece.loss_weights.tolist() == [0, 1, 1, 1] and event is None
    assert given.loss_weights[0] == 1  # the caller's example is left alone


@pytest.mark.parametrize(
    ("overlong", "pieces", "event"),
    [
        ("truncate", [[1, 2, 3, 4]], "truncated"),
        ("drop", [], "dropped"),
        ("split", [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]], "split"),
    ],
)
def test_what_is_too_long_is_cut_by_policy(overlong, pieces, event):
    fitted = fit(example(10), 4, overlong)
    assert [piece.input_ids.tolist() for piece in fitted.items] == pieces
    assert all(piece.loss_weights.tolist() == [0, 1, 1, 1][: len(piece.input_ids)] for piece in fitted.items)
    assert fitted.event == event


def test_pieces_without_loss_are_left_out():
    late = example(9, [0] * 6 + [1] * 3)
    assert fit(late, 4, "truncate") == ([], "dropped")
    fitted = fit(late, 4, "split")
    assert [piece.input_ids[0] for piece in fitted.items] == [5] and fitted.event == "split"  # the last is one token


def kept(ids_and_weights, max_length):
    ids, weights = zip(*ids_and_weights, strict=True)
    item = Example(np.array(ids, np.int32), np.array(weights, np.float32))
    pieces, event = fit(item, max_length, "keep_completion")
    return [(piece.input_ids.tolist(), piece.loss_weights.tolist()) for piece in pieces], event


def test_keeping_the_completion_equals_the_construction_by_hand():
    rng = random.Random(0)
    for _ in range(300):
        prompt, completion = rng.randint(1, 20), rng.randint(1, 20)
        after, max_length = rng.randint(0, 2), rng.randint(2, 30)
        weight = rng.choice([1.0, 0.25])
        tokens = [*((n, 0.0) for n in range(prompt)), *((100 + n, weight) for n in range(completion))]
        tokens += [(200 + n, 0.0) for n in range(after)]
        room = max_length - completion - after  # for the prompt
        if len(tokens) <= max_length:
            expected, event = tokens, None
        elif room < 1:
            assert kept(tokens, max_length) == ([], "dropped")
            continue
        else:
            expected, event = tokens[prompt - room :], "prompt_truncated"
        ids, weights = map(list, zip(*expected, strict=True))
        assert kept(tokens, max_length) == ([(ids, weights)], event)


@pytest.mark.parametrize("overlong", ["truncate", "split", "keep_completion"])
def test_weights_and_signals_stay_with_their_tokens_when_an_example_is_cut(overlong):
    rng = np.random.default_rng(0)
    pieces = 0
    for _ in range(200):
        length = int(rng.integers(2, 40))
        weights = rng.choice([0, 0, 0.25, 1, 3], length).astype(np.float32)
        ids = np.arange(length, dtype=np.int32)
        fitted = fit(Example(ids, weights, {"number": ids * 2}), 16, overlong).items
        pieces += len(fitted)
        for piece in fitted:
            assert len(piece.input_ids) <= 16
            np.testing.assert_array_equal(piece.signals["number"], piece.input_ids * 2)
            changed = np.flatnonzero(piece.loss_weights != weights[piece.input_ids])
            assert not piece.loss_weights[changed].any()  # weights are only taken away,
            np.testing.assert_array_equal(changed, np.arange(len(changed)))  # at the beginning of a piece,
            # and, beyond its first token, only in an answer that has lost its own beginning.
            first = piece.input_ids[0]
            assert len(changed) <= 1 or (overlong == "keep_completion" and weights[first - 1] and weights[first])
    assert pieces > 100


def test_an_earlier_answer_without_its_beginning_is_not_trained():
    tokens = [(1, 0), (2, 1), (3, 1), (4, 1), (5, 0), (6, 1), (7, 1)]
    assert kept(tokens, 5) == ([([3, 4, 5, 6, 7], [0, 0, 0, 1, 1])], "prompt_truncated")
    assert kept(tokens, 6) == ([([2, 3, 4, 5, 6, 7], [0, 1, 1, 0, 1, 1])], "prompt_truncated")
    assert kept(tokens, 3) == ([([5, 6, 7], [0, 1, 1])], "prompt_truncated")
    assert kept(tokens, 2) == ([], "dropped")


def test_the_examples_of_a_bundle_lose_the_same_prompt():
    pair = (example(6, [0, 0, 0, 1, 1, 1]), example(5, [0, 0, 0, 1, 1]))
    ((left, right),), event = fit(pair, 5, "keep_completion")
    assert (left.input_ids.tolist(), right.input_ids.tolist(), event) == (
        [2, 3, 4, 5, 6],
        [2, 3, 4, 5],
        "prompt_truncated",
    )
    assert fit(pair, 3, "keep_completion") == ([], "dropped")
    ((left, right),), event = fit(pair, 6, "keep_completion")
    assert len(left.input_ids) == 6 and event is None


def test_random_items_keep_the_packers_order():
    rng = random.Random(0)
    packer = BestFit(100, 10)
    for item in range(1000):
        packer.add(item, rng.randint(1, 100))
        room = packer._room
        assert room == sorted(room) and len(room) == len(packer.open_rows) <= 10


def test_a_bundle_is_numbered_and_its_examples_are_neighbours():
    row = make_row([(example(2), example(1)), (example(3), example(1))], 9)
    assert row.segment_ids.tolist() == [1, 1, 2, 3, 3, 3, 4, 0, 0]
    assert row.bundle_ids.tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0]


def test_a_bundle_is_cut_example_by_example_and_never_apart():
    pair = (example(6), example(2))
    ((left, right),), event = fit(pair, 4, "truncate")
    assert (left.input_ids.tolist(), right.input_ids.tolist(), event) == ([1, 2, 3, 4], [1, 2], "truncated")
    assert left.loss_weights.tolist() == [0, 1, 1, 1] and right.loss_weights.tolist() == [0, 1]
    assert fit((example(2), example(3)), 4, "truncate").event is None
    assert fit(pair, 4, "drop") == ([], "dropped")
    assert fit((example(6, [0] * 5 + [1]), example(2)), 4, "truncate") == ([], "dropped")  # one side has no loss left


def with_signals(length, **signals):
    return Example(*example(length)[:2], {name: np.array(values) for name, values in signals.items()})


def test_signals_must_fit_their_tokens_and_each_other():
    assert signal_types(with_signals(2, a=[1, 2], b=[[1.0], [2.0]])) == {
        "a": (np.dtype(np.int64), ()),
        "b": (np.dtype(np.float64), (1,)),
    }
    with pytest.raises(ValueError, match="a has 3 values for 2 tokens"):
        signal_types(with_signals(2, a=[1, 2, 3]))
    with pytest.raises(ValueError, match="loss_weights has 3 values for 2 tokens"):
        signal_types(Example(np.arange(2), np.ones(3)))
    with pytest.raises(ValueError, match="its signals are none, and those of other examples a int64"):
        signal_types((with_signals(2, a=[1, 2]), example(2)))
    with pytest.raises(ValueError, match=r"a float64\[\], .* a int64\[\]"):
        signal_types((with_signals(1, a=[1]), with_signals(1, a=[1.0])))


def test_a_row_of_padding_has_the_signals_of_the_others():
    item = with_signals(2, a=[3, 4], b=[[1.0], [2.0]])
    batch = stack_rows([make_row([item], 3), make_row([], 3, signal_types(item))])
    assert batch.signals["a"].tolist() == [[3, 4, 0], [0, 0, 0]] and batch.signals["b"].shape == (2, 3, 1)
    with pytest.raises(AssertionError, match="differ in their signals"):
        stack_rows([make_row([item], 3), make_row([], 3)])
