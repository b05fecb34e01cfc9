"""What a run's folder says of its config, without and with recorded changes."""

import json
import os

import pytest

from jaxtrain.config import config_tree, dump_config, parse_config
from jaxtrain.session.record import (
    CHANGES,
    CONFIG,
    INPUTS,
    QUICKSTART_MARK,
    effective_config,
    effective_inputs,
    read_saved_run,
    remove_quickstart_mark,
    write_atomically,
)


def config(**optimizer):
    tree = {"recipe": "sft", "model": {"path": "base"}, "data": {"train": {"path": "a.jsonl"}}, "train": {"steps": 2}}
    return parse_config(tree | {"optimizer": optimizer}, "test")


def test_the_newest_recorded_change_is_the_config_and_the_inputs(tmp_path):
    (tmp_path / CONFIG).write_text(dump_config(config(learning_rate=0.1)))
    assert effective_inputs(tmp_path) == {}
    (tmp_path / INPUTS).write_text(json.dumps({"model.path": {"config.json": "0"}}))
    assert effective_config(tmp_path) == config(learning_rate=0.1)
    assert effective_inputs(tmp_path) == {"model.path": {"config.json": "0"}}
    for rate in (0.2, 0.3):
        line = {
            "step": 1,
            "config": config_tree(config(learning_rate=rate)),
            "inputs": {"model.path": {"a": str(rate)}},
        }
        with (tmp_path / CHANGES).open("a") as file:
            file.write(json.dumps(line) + "\n")
    assert effective_config(tmp_path) == config(learning_rate=0.3)
    assert effective_inputs(tmp_path) == {"model.path": {"a": "0.3"}}


def test_a_run_without_a_checkpoint_is_its_config_and_a_folder_of_none_is_named(tmp_path):
    (tmp_path / CONFIG).write_text(dump_config(config()))
    saved = read_saved_run(tmp_path)
    assert (saved.config, saved.step) == (config(), None)
    with pytest.raises(ValueError, match="nothing is not the folder of a run"):
        read_saved_run(tmp_path / "nothing")


def test_a_file_that_cannot_be_written_keeps_its_old_content(tmp_path):
    write_atomically(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "file", "new \ud800")
    assert (tmp_path / "file").read_text() == "old"


def test_a_mark_is_dropped_unless_it_is_of_this_process(tmp_path):
    mark = tmp_path / QUICKSTART_MARK
    for process, stays in ((os.getpid(), True), (os.getpid() + 1, False)):
        mark.write_text(json.dumps({"process": process}))
        remove_quickstart_mark(tmp_path)
        assert mark.exists() == stays
