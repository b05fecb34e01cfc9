"""A change of a config is reported by its key, unless the numbers of the run do not depend on it."""

import pytest

from jaxtrain.config import ConfigError, parse_config
from jaxtrain.config.changes import check_keys, covers, differences, input_paths

TREE = {"recipe": "sft", "model": {"path": "model"}, "data": {"train": {"path": "a.jsonl"}}, "train": {"steps": 4}}


def changed(one, other):
    return [str(change) for change in differences(parse_config(TREE | one, "x"), parse_config(TREE | other, "x"))]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({}, {}, []),
        ({}, {"log": {"every": 3}, "mesh": {"data": 2}, "checkpoint": {"keep": 5}}, []),
        ({}, {"train": {"steps": 4, "batch_size": 16, "microbatches": 2}}, ["train.batch_size: 8 -> 16"]),
        ({}, {"optimizer": {"learning_rate": 1e-3}}, ["optimizer.learning_rate: 2e-05 -> 0.001"]),
        ({}, {"data": {"train": [{"path": "a.jsonl"}]}}, None),  # the whole section, of another kind
        (
            {"data": {"train": [{"path": "a"}, {"path": "b"}]}},
            {"data": {"train": [{"path": "a"}, {"path": "b", "weight": 2.0}]}},
            ["data.train.1.weight: 1.0 -> 2.0"],
        ),
        ({}, {"objective": {"name": "SFT"}}, []),
        ({"optimizer": {"schedule": "cosine"}}, {"train": {"steps": 5}, "optimizer": {"schedule": "cosine"}}, 1),
        ({"optimizer": {"schedule": "constant"}}, {"train": {"steps": 5}, "optimizer": {"schedule": "constant"}}, []),
        ({"optimizer": {"schedule": "constant"}}, {"train": {"steps": 3}, "optimizer": {"schedule": "constant"}}, 1),
    ],
)
def test_a_change_is_reported_unless_the_numbers_do_not_depend_on_it(one, other, expected):
    found = changed(one, other)
    match expected:
        case None:
            assert len(found) == 1 and found[0].startswith("data.train: ")
        case int():
            assert [change.partition(":")[0] for change in found] == ["train.steps"]
        case _:
            assert found == expected


def test_paths_of_inputs_are_marked_and_listed_by_their_key():
    (change,) = differences(parse_config(TREE, "x"), parse_config(TREE | {"model": {"path": "other"}}, "x"))
    assert (change.key, change.is_input) == ("model.path", True)
    config = parse_config(TREE | {"data": {"train": [{"path": "a"}, {"path": "b"}], "eval": {"path": "c"}}}, "x")
    assert dict(input_paths(config)) == {
        "model.path": "model",
        "data.train.0.path": "a",
        "data.train.1.path": "b",
        "data.eval.path": "c",
    }


def test_a_key_that_no_config_has_is_refused_with_the_nearest_one():
    config = parse_config(TREE | {"model": {"config": {"hidden_size": 8}}}, "x")
    check_keys(["train.steps", "train", "data.train.0.weight", "model.config.hidden_size", "objective"], config)
    with pytest.raises(ConfigError, match=r"--allow-change train\.stps: no such key; did you mean train\.steps\?"):
        check_keys(["train.stps"], config)


def test_a_section_covers_its_keys_and_no_neighbours():
    assert covers(["train"], "train.steps") and covers(["train.steps"], "train.steps")
    assert not covers(["train.step"], "train.steps") and not covers([], "train.steps")
