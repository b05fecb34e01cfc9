"""Generation for a file of prompts."""

import json

import numpy as np
import pytest
from hf_folders import save

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.recipes.generate import generate_file
from jaxtrain.sample.requests import EngineLimits, Request, SamplingParams
from jaxtrain.serve.served import load_served

SIZES = {"vocab_size": 259, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("model") / "tiny", "llama", **SIZES)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def served(folder):
    return load_served(folder, dtype="float32", max_length=96, slots=8, limits=EngineLimits(8, alternatives=5))


def test_a_file_of_prompts_comes_back_in_order_with_completions(served, tmp_path):
    rows = [{"prompt": "ab", "tag": 1}, {"messages": [{"role": "user", "content": "c"}]}, {"prompt_ids": [5, 6, 7]}] * 4
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    params = SamplingParams(max_tokens=6, n=2, seed=0)
    tokens = generate_file(served, tmp_path / "in.jsonl", tmp_path / "out.jsonl", params)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "completions"} for row in written] == rows
    assert tokens == sum(len(each["ids"]) for row in written for each in row["completions"])
    assert all(len(row["completions"]) == 2 for row in written)
    assert written[0]["completions"] == written[3]["completions"]  # the same prompt and seed, another slot
    ids = served.prompt_ids(rows[1])
    ((again,),) = served.engine.generate([Request(ids, SamplingParams(6, seed=0, stop_ids=served.stop_ids))])
    assert written[1]["completions"][0]["ids"] == again.ids.tolist()
    np.testing.assert_allclose(written[1]["completions"][0]["logps"], again.raw_logps, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, r"in.jsonl, row 2: .* this one has question"),
        ({"prompt": 5}, "in.jsonl, row 2: prompt must be a string, not 5"),
        ({"prompt_ids": [1.5]}, "in.jsonl, row 2: prompt_ids must be a list of token ids: .* must be int, not 1.5"),
        ({"prompt_ids": [2**31]}, "in.jsonl, row 2: prompt_ids must be a list of token ids: .*2147483648 must be at"),
        ({"prompt": "a" * 200}, r"in.jsonl, row 2: the prompt has \d+ tokens, and max_length=96"),
    ],
)
def test_a_bad_row_is_named_and_nothing_written(served, tmp_path, row, message):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        generate_file(served, tmp_path / "in.jsonl", tmp_path / "out.jsonl", SamplingParams())
    assert not (tmp_path / "out.jsonl").exists()
