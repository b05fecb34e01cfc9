"""The prompts of a run leave room for an answer."""

import json
from types import SimpleNamespace

import pytest

from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain.config import parse_config
from jaxtrain.data.formats import Encoder
from jaxtrain.data.sources import DataError
from jaxtrain.rl.run_prompts import prompt_stream


def prompts_of(tmp_path, rows, **data):
    write_byte_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "rows.jsonl"), "epochs": 1}
    tree = {
        "recipe": "rl",
        "model": {"path": "base"},
        "data": {"train": source, "max_length": 64, "shuffle": False, **data},
        "train": {"steps": 1},
        "rl": {"rewards": [{"function": "my_rewards.py:r"}], "max_completion_length": 24},
    }
    encode = Encoder(load_tokenizer(tmp_path / "tokenizer"))
    session = SimpleNamespace(config=parse_config(tree, "test"), encoder=lambda policy: encode)
    return prompt_stream(session, None).draw(10), encode


def test_a_prompt_is_what_the_model_is_asked_with_all_columns_of_its_row(tmp_path):
    rows = [{"prompt": "2 + 3?", "answer": "5", "level": 1}, {"prompt": [{"role": "user", "content": "hi"}]}]
    prompts, encode = prompts_of(tmp_path, rows)
    assert [prompt.number for prompt in prompts] == [0, 1]
    for prompt, row in zip(prompts, rows, strict=True):
        assert prompt.ids.tolist() == encode.question(row)[0].tolist()
        assert dict(prompt.columns) == row


def test_a_prompt_that_leaves_no_room_is_a_bad_row(tmp_path):
    rows = [{"prompt": "short"}, {"prompt": "x" * 64}, {"prompt": "brief"}]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the prompt has \d+ tokens; .* leaves room for 40"):
        prompts_of(tmp_path, rows)
    with pytest.warns(UserWarning, match="skipped a bad row"):
        prompts, _ = prompts_of(tmp_path, rows, on_bad_row="skip")
    assert [prompt.columns["prompt"] for prompt in prompts] == ["short", "brief"]
