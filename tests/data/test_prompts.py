import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import CHATML, tokenizer

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.formats import Encoder
from jaxtrain.data.prompts import PromptStream, held_out_prompts
from jaxtrain.data.sources import DataError


def stream(tmp_path, rows, make=lambda number, row: (number, row["question"]), **data):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceSection(path=str(file), epochs=data.pop("epochs", None))
    return PromptStream([source], DataSection(train=source, **data), make, seed=3)


ROWS = [{"question": f"q{i}", "answer": i} for i in range(5)]


def test_epochs_are_numbered_on_and_a_state_goes_on_where_it_was_taken(tmp_path):
    whole = stream(tmp_path, ROWS).draw(12)
    assert [number for number, _ in whole] == list(range(12))
    assert sorted(question for _, question in whole[:5]) == [row["question"] for row in ROWS]
    first, second = stream(tmp_path, ROWS), stream(tmp_path, ROWS)
    assert first.draw(7) == whole[:7]
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert second.draw(5) == whole[7:]


def test_an_exhausted_source_gives_fewer(tmp_path):
    prompts = stream(tmp_path, ROWS, epochs=1)
    assert [len(prompts.draw(3)) for _ in range(3)] == [3, 2, 0]
    assert prompts.get_state()["prompts"]["number"] == 5


def test_prompts_of_epochs_are_counted_without_the_bad_ones(tmp_path):
    def make(number, row):
        if row["answer"] == 0:
            raise ValueError("no")
        return number

    prompts = stream(tmp_path, ROWS, make, on_bad_row="skip")
    assert not prompts.finite
    prompts.end_after(2)
    assert prompts.finite and prompts.count() == 8
    assert prompts.get_state()["prompts"]["bad_rows"] == 0  # counted for the run alone
    with pytest.warns(UserWarning, match="skipped a bad row"):
        assert prompts.draw(100) == list(range(8))
    assert prompts.epoch(prompts.get_state()) == 2
    whole = stream(tmp_path, ROWS)
    whole.end_after(1.5)
    assert whole.count() == len(whole.draw(100)) == 8


def test_bad_rows_are_errors_with_their_place_or_skipped_and_counted(tmp_path):
    def make(number, row):
        if row["answer"] == 0:
            raise ValueError("no")
        return number

    with pytest.raises(DataError, match=r"rows.jsonl:1: no"):
        stream(tmp_path, ROWS, make)
    prompts = stream(tmp_path, ROWS, make, on_bad_row="skip")
    with pytest.warns(UserWarning, match="skipped a bad row"):
        assert prompts.draw(8) == list(range(8))
    assert prompts.get_state()["prompts"]["bad_rows"] == 2
    with pytest.raises(DataError, match="no row gives a prompt"), pytest.warns(UserWarning):
        stream(tmp_path, ROWS[:1], make, on_bad_row="skip").draw(1)


def question(number, row):
    return Encoder(None).question(row)


@pytest.mark.parametrize(
    "row", [{"text": "x"}, {"input_ids": [1]}, {"question": "x"}, {"completion": "x"}, {"prompt": None}]
)
def test_a_row_without_a_prompt_is_an_error_with_its_place(tmp_path, row):
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*prompt"):
        stream(tmp_path, [row], question)
    prompts = stream(tmp_path, [row] * 3, question, on_bad_row="skip")
    with (
        pytest.warns(UserWarning, match=r"rows.jsonl:[123]: "),
        pytest.raises(DataError, match=r"no row .* \(4 bad rows\)"),
    ):
        prompts.draw(1)
    once = stream(tmp_path, [row] * 3, question, on_bad_row="skip", epochs=1)
    with (
        pytest.warns(UserWarning),
        pytest.raises(DataError, match=r"no row gives a prompt \(3 bad rows\): .*rows.jsonl"),
    ):
        once.draw(1)


def test_held_out_prompts_are_the_first_in_order_and_name_or_skip_bad_rows(tmp_path):
    def make(number, row):
        if row["answer"] == 1:
            raise ValueError("no")
        return number, row["question"]

    stream(tmp_path, ROWS)  # writes the file
    source = SourceSection(path=str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"rows.jsonl:2: no"):
        held_out_prompts([source], DataSection(train=source), make, count=3)
    skipping = DataSection(train=source, on_bad_row="skip")
    with pytest.warns(UserWarning, match="rows.jsonl:2: no"):
        assert held_out_prompts([source], skipping, make, count=3) == [(0, "q0"), (1, "q2"), (2, "q3")]
    assert held_out_prompts([source], skipping, make, count=1) == [(0, "q0")]
    with (
        pytest.warns(UserWarning, match="skipped a bad row"),
        pytest.raises(DataError, match=r"no row gives a prompt \(5 bad rows\): .*rows\.jsonl:1: substring"),
    ):
        held_out_prompts([source], skipping, lambda number, row: row["question"].index("x"), count=3)


def test_verls_parquet_gives_prompts_with_the_ground_truth_as_answer(tmp_path):
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"What {n}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(n)},
            "extra_info": {"split": "train", "index": n},
        }
        for n in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    source = SourceSection(path=str(tmp_path / "train.parquet"))
    tok = tokenizer(CHATML)
    encode = Encoder(tok)
    prompts = PromptStream([source], DataSection(train=source), lambda _, row: encode.question(row), seed=0).draw(4)
    for ids, columns in prompts:
        number = columns["extra_info"]["index"]
        assert columns == rows[number] | {"answer": str(number)}
        assert f"user\nWhat {number}<|im_end|>" in tok.decode(ids)


def test_prompts_that_were_used_out_of_order_are_not_drawn_again(tmp_path):
    whole = stream(tmp_path, ROWS).draw(12)
    resumed = stream(tmp_path, ROWS)
    state = stream(tmp_path, ROWS).get_state()
    resumed.set_state({"prompts": {**state["prompts"], "used": [0, 2, 7]}})
    assert resumed.draw(3) == [whole[1], whole[3], whole[4]]
    again = stream(tmp_path, ROWS)
    again.set_state(json.loads(json.dumps(resumed.get_state())))
    assert again.draw(4) == resumed.draw(4) == [whole[5], whole[6], whole[8], whole[9]]
