import datetime

import pytest
from pydantic import ValidationError

from jaxtrain.config.data import DataSection, SourceSection


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        (SourceSection, {}, "Field required"),
        (SourceSection, {"path": "a", "args": {"n": 1}}, "`args` are for a function"),
        (SourceSection, {"path": "a", "rows": [{}]}, "give only one of `path`"),
        (DataSection, {"train": {"path": "a"}, "date": "yesterday"}, "Invalid isoformat string"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(section, keys, message):
    with pytest.raises(ValidationError, match=message):
        section(**keys)


def test_a_date_is_the_same_as_text_and_as_yaml_reads_it():
    dates = ("2024-05-06", datetime.date(2024, 5, 6))
    assert {DataSection(train=SourceSection(path="a"), date=date).date for date in dates} == {"2024-05-06"}


def test_rows_of_a_program_have_a_path_that_depends_on_their_content():
    first, same, other = (SourceSection(rows=[{"text": text}]) for text in ("a", "a", "b"))
    assert first.path.startswith("rows:") and first.path == same.path != other.path
