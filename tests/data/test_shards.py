import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from chat_templates import CHATML, tokenizer

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.formats import Encoder
from jaxtrain.data.mixing import Mixture
from jaxtrain.data.shards import COUNTERS, Reader, Shard
from jaxtrain.data.sources import DataError, Source

T = 16


@pytest.fixture
def opened(tmp_path):
    """A shard over rows of the lengths given; token 1 of a row is its number. `lengths` 0 makes a bad row."""

    def make(lengths, *, sources=1, epochs=1, **data):
        lines = [{"input_ids": [7, row, *[9] * (length - 2)][: length or 1]} for row, length in enumerate(lengths)]
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        section = SourceSection(path=str(path), epochs=epochs)
        settings = DataSection(train=section, max_length=T, shuffle=False, **{"packing_bins": 2} | data)
        files = [Source(section) for _ in range(sources)]
        reader = Reader(files, settings, Encoder(None))
        return Shard(Mixture(files, seed=0, shuffle=False, shard=0, num_shards=1), reader, settings)

    return make


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as executor:
        yield executor


def contents(rows):
    return [row.tokens[row.positions == 1].tolist() for row in rows]


def test_rows_hold_every_example_once(opened, threads):
    lengths = [5, 9, 3, 16, 8, 2, 7, 11]
    rows = list(opened(lengths).rows(threads))
    assert sorted(number for row in contents(rows) for number in row if number != 0) == list(range(1, 8))
    assert sum(int((row.segment_ids > 0).sum()) for row in rows) == sum(lengths)


@pytest.mark.parametrize("at", range(6))
def test_a_state_resumes_within_a_row(opened, threads, at):
    lengths = [5, 9, 3, 16, 8, 2, 7, 11, 4, 6, 13, 30, 3]
    whole = list(opened(lengths, overlong="split").rows(threads))
    shard = opened(lengths, overlong="split")
    before = shard.rows(threads)
    list(itertools.islice(before, at))
    state = json.loads(json.dumps(shard.state()))
    assert at == 0 or state["open"] or at == len(whole)
    resumed = opened(lengths, overlong="split")
    resumed.restore(state)
    assert resumed.state() == state
    rest = list(resumed.rows(threads))
    assert len(rest) == len(whole) - at
    for row, expected in zip(rest, whole[at:], strict=True):
        np.testing.assert_array_equal(row.tokens, expected.tokens)


def test_events_are_counted(opened, threads):
    shard = opened([5, 40, 0, 4], on_bad_row="skip")
    with pytest.warns(UserWarning, match=r"a\.jsonl:3: "):
        list(shard.rows(threads))
    assert {name: shard.state()["next"][name] for name in COUNTERS} == {
        "truncated": 1,
        "prompt_truncated": 0,
        "equal_pairs": 0,
        "dropped": 0,
        "split": 0,
        "bad_rows": 1,
        "thoughts_left_out": 0,
        "thoughts_moved": 0,
        "arguments_unread": 0,
        "nulls_left_out": 0,
    }


def test_an_error_comes_after_the_rows_before_it(opened, threads):
    rows = opened([16, 16, 0, 16]).rows(threads)
    assert [row.tokens[1] for row in itertools.islice(rows, 2)] == [0, 1]
    with pytest.raises(DataError, match=r"a\.jsonl:3: "):
        next(rows)


def test_a_state_that_does_not_fit_is_refused(opened, threads):
    shard = opened([5, 9, 3, 4])
    next(shard.rows(threads))
    with pytest.raises(ValueError, match=r"1 sources and data\.train has 2"):
        opened([5, 9, 3, 4], sources=2).check(shard.state())


def test_a_row_that_changed_since_the_state_was_saved_is_named(opened, threads):
    state = opened([40, 9], overlong="split").state()
    changed = opened([4, 9], overlong="split")
    changed.restore(state | {"open": [[[0, 0, 2]]]})  # the third piece of row 0
    with pytest.raises(DataError, match="row 0 of source 0 is not what it was"):
        list(changed.rows(threads))


def test_a_row_of_padding_has_the_arrays_of_the_others(opened, threads):
    shard = opened([5])
    (row,) = shard.rows(threads)
    padding = shard.padding()
    assert padding.arrays().keys() == row.arrays().keys() and not padding.segment_ids.any()


def test_columns_that_are_not_read_are_reported_once_for_a_source(tmp_path, caplog):
    rows = [{"input_ids": [1, 2], "id": n, **({"url": "u"} if n > 2 else {})} for n in range(6)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mapped = tmp_path / "b.jsonl"
    mapped.write_text(json.dumps({"ids": [1, 2], "text": "x", "score": 1, "empty": None}) + "\n")
    sections = [SourceSection(path=str(path)), SourceSection(path=str(mapped), columns={"input_ids": "ids"})]
    encode = Encoder(None)
    for _ in range(2):  # training and evaluation
        reader = Reader([Source(section) for section in sections], DataSection(train=sections), encode)
        with ThreadPoolExecutor(2) as executor:
            futures = [reader.submit(executor, [(0, row)]) for row in range(6)]
            assert all(read.items for future in futures for read in future.result())
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: columns ignored: id",
        f"{mapped}: columns ignored: score, text",
        f"{path}: columns ignored: url",
    ]


def test_keys_of_messages_that_nothing_reads_are_reported_once_for_a_source(tmp_path, caplog):
    talk = [{"role": "user", "content": "What", "lang": "en", "note": None}, {"role": "assistant", "content": "Paris"}]
    answer = [talk[1] | {"weight": 1, "score": 3}]
    rows = [{"messages": talk}, {"prompt": talk[:1], "completion": answer}, {"messages": json.dumps(talk[:1] + answer)}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = SourceSection(path=str(path))
    for template, expected in [
        (CHATML, ["messages[].lang (user)", "messages[].score (assistant)"]),
        (CHATML + "{{ messages[0].lang }}", ["messages[].score (assistant)"]),
    ]:
        caplog.clear()
        reader = Reader([Source(section)], DataSection(train=section), Encoder(tokenizer(template)))
        with ThreadPoolExecutor(2) as executor:
            assert all(read.items for read in reader.submit(executor, [(0, row) for row in range(3)]).result())
        assert [record.getMessage() for record in caplog.records] == [f"{path}: columns ignored: {n}" for n in expected]


def test_a_weight_of_rows_is_reported_once_for_a_source(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [1, 2], "weight": weight}) + "\n" for weight in (1, 2, 0.5)))
    section = SourceSection(path=str(path))
    reader = Reader([Source(section)], DataSection(train=section), Encoder(None))
    with ThreadPoolExecutor(1) as executor:
        read = reader.submit(executor, [(0, row) for row in range(3)]).result()
    assert [float(each.items[0][0].loss_weights[1]) for each in read] == [1, 2, 0.5]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{path}: the column 'weight' is taken as the loss weight of each row"]


def test_a_function_of_ones_own_reads_the_columns_that_it_likes(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"input_ids": [1, 2], "id": 1}) + "\n")
    section = SourceSection(path=str(path))
    Reader([Source(section)], DataSection(train=section), lambda row: Encoder(None)(row))
    assert not caplog.records


def test_a_row_without_a_prompt_to_cut_is_counted_as_dropped(opened, threads):
    shard = opened([5, 40, 4], overlong="keep_completion")
    assert len(list(shard.rows(threads))) == 1
    assert shard.state()["next"]["dropped"] == 1  # all of it is trained, so there is no prompt to cut
