"""The quickstart replaces what it made, and nothing else."""

import json
import os

import pytest

from jaxtrain.recipes.made_files import MARK, find_conflicts, find_run_conflicts, replacing_files, replacing_run

NAMES = ("train.jsonl", "eval.jsonl")


def make(folder, text="made\n"):
    with replacing_files(folder, NAMES):
        for name in NAMES:
            (folder / name).write_text(text)


def test_what_it_made_is_replaced_and_what_a_user_made_or_changed_is_find_conflicts(tmp_path):
    home = tmp_path / "home"
    assert find_conflicts(home, NAMES) == []
    make(home)
    (home / "notes.txt").write_text("mine")
    assert find_conflicts(home, NAMES) == []
    make(home, "made again\n")
    assert find_conflicts(home, NAMES) == []
    (home / "eval.jsonl").write_text("mine")
    assert find_conflicts(home, NAMES) == [f"{home / 'eval.jsonl'}: changed since the quickstart made it"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text("mine")
    assert find_conflicts(tmp_path / "other", NAMES) == [
        f"{tmp_path / 'other' / 'train.jsonl'}: not made by the quickstart"
    ]


def test_a_link_in_place_of_a_file_is_the_users(tmp_path):
    make(tmp_path / "home")
    (tmp_path / "mine").write_text("made\n")
    (tmp_path / "home" / "train.jsonl").unlink()
    (tmp_path / "home" / "train.jsonl").symlink_to(tmp_path / "mine")
    assert len(find_conflicts(tmp_path / "home", NAMES)) == 1


def test_half_a_file_of_a_quickstart_that_was_killed_is_its_own(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing_files(tmp_path, NAMES):
        (tmp_path / "train.jsonl").write_text("ha")
        raise KeyboardInterrupt
    assert find_conflicts(tmp_path, NAMES) == []


def test_a_runs_folder_is_its_own_as_long_as_nothing_was_added_or_changed(tmp_path):
    run = tmp_path / "run"
    with replacing_run(run):
        (run / "metrics.jsonl").write_text("{}\n")
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "1").write_text("1")
    assert find_run_conflicts(run) == []
    (run / "checkpoints" / "2").write_text("mine")
    assert find_run_conflicts(run) == [f"{run / 'checkpoints/2'}: not made by the quickstart"]
    (run / "checkpoints" / "2").unlink()
    (run / "metrics.jsonl").write_text("mine")
    assert find_run_conflicts(run) == [f"{run / 'metrics.jsonl'}: changed since the quickstart made it"]


def test_of_a_killed_run_what_a_run_writes_is_its_own(tmp_path):
    (tmp_path / MARK).write_text(json.dumps({"process": os.getpid()}))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert find_run_conflicts(tmp_path) == []
    (tmp_path / "thesis.tex").write_text("mine")
    assert find_run_conflicts(tmp_path) == [f"{tmp_path / 'thesis.tex'}: not made by the quickstart"]


def test_a_new_run_removes_the_files_of_the_old_one_and_no_others(tmp_path):
    for name in ("metrics.jsonl", "thesis.tex"):
        (tmp_path / name).write_text("old")
    with replacing_run(tmp_path):
        assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "thesis.tex").read_text() == "old"
