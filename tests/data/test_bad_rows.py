import json

import pytest
from chat_templates import CHATML, tokenizer

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.formats import Encoder
from jaxtrain.data.pipeline import TrainStream
from jaxtrain.data.sources import DataError

BAD_ROWS = {
    "a lone surrogate": '{"prompt": "x \\ud83d", "completion": "y"}',
    "5000 digits": '{"prompt": "q", "completion": "a", "id": ' + "9" * 5000 + "}",
    "100,000 brackets": "[" * 100_000,
    "brackets in a string": json.dumps({"messages": [], "tools": "[" * 100_000}),
    "a number as tool calls": '{"messages": [{"role": "user", "content": "q", "tool_calls": 5}]}',
    "ids beyond int32": '{"input_ids": [1, 4294967297]}',
    "a null prompt": '{"prompt": null, "completion": "b"}',
}


@pytest.mark.parametrize("line", BAD_ROWS.values(), ids=BAD_ROWS)
def test_every_kind_of_bad_row_is_named_or_counted(tmp_path, line):
    path = tmp_path / "a.jsonl"
    good = ['{"prompt": "What", "completion": "Paris"}'] * 3
    path.write_text("\n".join([*good, line, *good]))
    section, encode = SourceSection(path=str(path), epochs=1), Encoder(tokenizer(CHATML))

    def opened(on_bad_row):
        data = DataSection(train=section, on_bad_row=on_bad_row)
        return TrainStream([section], data, encode, rows=1, seed=0, shards=[0], num_shards=1)

    with opened("error") as batches, pytest.raises(DataError, match=r"a\.jsonl:4: "):
        list(batches)
    with pytest.warns(UserWarning, match=r"a\.jsonl:4: "), opened("skip") as batches:
        list(batches)
        assert batches.stats["bad_rows"] == 1 and batches.stats["examples"] == 6
