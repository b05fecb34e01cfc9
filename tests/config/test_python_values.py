"""Rows, functions and classes that a program gives: what is recorded of them, and what is refused."""

import functools

import numpy as np
import pytest

from jaxtrain.config import ConfigError, config_tree, parse_config
from jaxtrain.config.changes import differences


class Game:
    pass


class OtherGame:
    pass


def tree(rows, **rl):
    return {"recipe": "rl" if rl else "sft", "model": {"path": "model"}, "data": {"train": {"rows": rows}}} | (
        {"rl": rl} if rl else {}
    )


def rows(count):
    return [{"prompt": str(number)} for number in range(count)]


def test_rows_are_recorded_by_their_content():
    one, same, other = (parse_config(tree(rows(count))) for count in (3, 3, 4))
    recorded = config_tree(one)["data"]["train"]
    assert "rows" not in recorded and recorded["path"].startswith("rows:")
    saved = parse_config(config_tree(one))
    assert differences(saved, same) == []
    assert [(change.key, change.is_input) for change in differences(saved, other)] == [("data.train.path", True)]
    reversed_rows = parse_config(tree(rows(3)[::-1]))
    assert [change.key for change in differences(saved, reversed_rows)] == ["data.train.path"]


def test_rows_are_copied_and_arrays_become_lists():
    given = [{"input_ids": np.arange(3)}]
    (source,) = parse_config(tree(given)).data.train_sources
    given[0]["input_ids"][0] = 9
    assert source.rows == ({"input_ids": [0, 1, 2]},)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "data.train: rows is empty"),
        ({"prompt": "x"}, "data.train: rows must be a list of dicts, not dict"),
        ([{"prompt": "x"}, "y"], "data.train: row 2 must be a dict, not str"),
        ([{"prompt": Game()}], "data.train: row 1 cannot be written as JSON: a value of type Game"),
    ],
    ids=lambda value: "",
)
def test_rows_that_cannot_be_used_are_named(given, expected):
    with pytest.raises(ConfigError, match=expected):
        parse_config(tree(given))


def test_rows_and_a_path_exclude_each_other():
    with pytest.raises(ConfigError, match="train: give only one of `path`"):
        parse_config(tree(rows(1)) | {"data": {"train": {"rows": rows(1), "path": "a.jsonl"}}})


def test_a_class_is_recorded_by_its_import_path():
    one, other = (parse_config(tree(rows(2), environment={"factory": game})) for game in (Game, OtherGame))
    recorded = config_tree(one)["rl"]["environment"]["factory"]
    assert recorded.endswith("test_python_values:Game")
    saved = parse_config(config_tree(one))
    assert differences(saved, one) == []
    assert [change.key for change in differences(saved, other)] == ["rl.environment.factory"]


def test_a_callable_without_a_name_is_refused():
    with pytest.raises(ConfigError, match="which has a name"):
        parse_config(tree(rows(2), environment={"factory": functools.partial(Game)}))
    with pytest.raises(ConfigError) as error:
        parse_config(tree(rows(2), environment={"factory": 3}))
    assert str(error.value).splitlines()[1:] == [
        "  rl.environment.factory: give an import path, or a function or a class, which has a name, not 3"
    ]
