import datetime

import pytest
from pydantic import ValidationError

from jaxtrain.config.sections import (
    AddTokensSection,
    DataSection,
    MeshSection,
    ModelSection,
    OptimizerSection,
    SourceSection,
)


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        (AddTokensSection, {}, "give `names`, or `prefix` and `count`"),
        (AddTokensSection, {"prefix": "<s"}, "`prefix` and `count` belong together"),
        (AddTokensSection, {"names": ["<s1>"], "prefix": "<s", "count": 2}, "a token is named twice"),
        (ModelSection, {"path": "a", "quantize": "int8"}, "quantize=int8 needs `lora` or `add_tokens.alone`"),
        (ModelSection, {"config": {}, "add_tokens": {"names": ["x"]}}, "add_tokens needs `tokenizer`"),
        (SourceSection, {}, "Field required"),
        (SourceSection, {"path": "a", "args": {"n": 1}}, "`args` are for a function"),
        (SourceSection, {"path": "a", "rows": [{}]}, "give only one of `path`"),
        (OptimizerSection, {"args": {"x": 1}}, "args are for an optimizer or schedule named by import path"),
        (MeshSection, {"fsdp": 0}, "greater than 0, or -1 for all devices"),
        (DataSection, {"train": {"path": "a"}, "date": "yesterday"}, "Invalid isoformat string"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(section, keys, message):
    with pytest.raises(ValidationError, match=message):
        section(**keys)


def test_new_tokens_are_the_names_and_the_numbered_ones():
    assert AddTokensSection(names=["<a>"], prefix="<sid_", count=2).tokens == ["<a>", "<sid_0>", "<sid_1>"]


def test_a_date_is_the_same_as_text_and_as_yaml_reads_it():
    dates = ("2024-05-06", datetime.date(2024, 5, 6))
    assert {DataSection(train=SourceSection(path="a"), date=date).date for date in dates} == {"2024-05-06"}


def test_rows_of_a_program_have_a_path_that_depends_on_their_content():
    first, same, other = (SourceSection(rows=[{"text": text}]) for text in ("a", "a", "b"))
    assert first.path.startswith("rows:") and first.path == same.path != other.path


def test_a_share_of_warm_up_becomes_a_number_of_steps_rounded_up():
    section = OptimizerSection(warmup_ratio=0.1).for_steps(11)
    assert (section.warmup_steps, section.warmup_ratio) == (2, 0.0)
    assert OptimizerSection(warmup_steps=3).for_steps(11).warmup_steps == 3
