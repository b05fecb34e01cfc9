import pytest

from jaxtrain.config import SourceSection
from jaxtrain.data.fingerprints import check_unchanged, fingerprints
from jaxtrain.data.sources import DataError, Source


def of(folder):
    return fingerprints([Source(SourceSection(path=str(folder)))])


def test_a_moved_file_is_the_same_and_a_changed_one_is_named(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.jsonl").write_text('{"text": "one"}\n')
        (tmp_path / place / "b.jsonl").write_text('{"text": "two"}\n')
    saved = of(tmp_path / "here")
    check_unchanged(saved, of(tmp_path / "there"))

    (tmp_path / "there" / "b.jsonl").write_text('{"text": "six"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl was changed .*has other content of the same length"):
        check_unchanged(saved, of(tmp_path / "there"))
    (tmp_path / "there" / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl was changed .*has 2 rows and had 1, "):
        check_unchanged(saved, of(tmp_path / "there"))
    (tmp_path / "there" / "b.jsonl").rename(tmp_path / "there" / "c.jsonl")
    (tmp_path / "there" / "d.jsonl").write_text('{"text": "four"}\n')
    with pytest.raises(DataError, match=r"has 3 files and had 2 .*b\.jsonl is gone, c\.jsonl is new, d\.jsonl is new"):
        check_unchanged(saved, of(tmp_path / "there"))
