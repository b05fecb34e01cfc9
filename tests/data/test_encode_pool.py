"""Worker processes make what threads do."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
from chat_templates import CHATML, tokenizer

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.encode_pool import EncodePool, encode_rows
from jaxtrain.data.formats import Encoder
from jaxtrain.data.pipeline import TrainStream
from jaxtrain.data.sources import DataError

ROWS = [{"prompt": f"What {number}", "completion": "Paris " * (number % 7)} for number in range(200)]


def encoder():
    return Encoder(tokenizer(CHATML), loss_on="all", vocab_size=10_000)


@pytest.fixture(scope="module")
def pool():
    made = EncodePool(encoder(), 2)
    yield made
    made.close()


def test_examples_and_errors_are_those_of_one_process(pool):
    found, expected = pool(ROWS), encode_rows(encoder(), ROWS)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, ValueError):
            assert str(one) == str(other)
        else:
            np.testing.assert_array_equal(one.input_ids, other.input_ids)
            np.testing.assert_array_equal(one.loss_weights, other.loss_weights)
    assert str(found[0]) == "completion[0]: the assistant's turn is empty"


def test_workers_survive_the_signals_that_slurm_sends_to_every_process_of_a_job(pool):
    pool(ROWS[:2])
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGUSR1)
    assert len(pool(ROWS)) == len(ROWS)


def test_a_stream_is_the_same_and_resumes_with_any_number_of_processes(pool, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtrain.data.pipeline.EncodePool", lambda *_: pool)
    monkeypatch.setattr(pool, "close", lambda: None)  # it is used again
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def stream(processes, on_bad_row="skip"):
        section = SourceSection(path=str(path), epochs=1)
        data = DataSection(train=section, max_length=64, processes=processes, on_bad_row=on_bad_row, shuffle=False)
        return TrainStream([section], data, encoder(), rows=4, seed=0, shards=range(4), num_shards=4)

    with pytest.warns(UserWarning, match="skipped a bad row"), stream(0) as threads, stream(2) as processes:
        assert threads.lengths(None)[0].sizes.tolist() == processes.lengths(None)[0].sizes.tolist()
        for number, (one, other) in enumerate(zip(threads, processes, strict=True)):
            for name, array in one.arrays().items():
                np.testing.assert_array_equal(array, other.arrays()[name])
            if number == 2:
                threads.set_state(processes.get_state())
        assert threads.stats == processes.stats and threads.stats["bad_rows"] == 29
    path.write_text(path.read_text().replace('"What 0", "completion": ""', '"What 0", "completion": "b"', 1))
    for number in (0, 2):
        with stream(number, "error") as batches, pytest.raises(DataError, match=r"a\.jsonl:29: .* turn is empty"):
            list(batches)


def test_a_function_that_cannot_be_sent_is_refused():
    with pytest.raises(ValueError, match=r"data\.processes=1: the function that makes examples cannot be sent"):
        EncodePool(lambda row: row, 1)


def test_a_worker_that_dies_is_named():
    pool = EncodePool(os._exit, 1)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="a worker process that encodes rows has died"):
        pool([1])  # type: ignore[list-item]
    pool.close()
