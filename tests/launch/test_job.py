"""A job: its config is checked where it is launched, and its command repeats the overrides."""

import shlex

import pytest
import yaml
from launch_stubs import write_config

from jaxtrain.config import ConfigError
from jaxtrain.launch.job import dns_label, make_job, shell_words


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


def test_the_folder_and_the_name_come_from_the_config(config, tmp_path):
    job = make_job(config, [], nodes=2, retries=1, name=None)
    assert (job.run_dir, job.name) == (tmp_path / "runs" / "tiny", "tiny")
    job = make_job(config, ["run.dir=elsewhere/other"], nodes=2, retries=1, name="mine")
    assert (str(job.run_dir), job.name) == ("elsewhere/other", "mine")
    assert str(job.beside("-7.log")) == "elsewhere/other-7.log"


def test_stages_share_a_folder(config, tmp_path):
    tree = yaml.safe_load(config.read_text())
    stage = {key: tree.pop(key) for key in ("recipe", "data", "train")}
    config.write_text(yaml.safe_dump(tree | {"stages": [{"name": "one", **stage}, {"name": "two", **stage}]}))
    assert make_job(config, [], nodes=1, retries=0, name=None).run_dir == tmp_path / "runs" / "tiny"


@pytest.mark.parametrize(("override", "message"), [("train.stepz=1", "train.steps"), ("train.steps=x", "train.steps")])
def test_a_wrong_config_is_not_launched(config, override, message):
    with pytest.raises(ConfigError, match=message):
        make_job(config, [override], nodes=1, retries=0, name=None)


def test_a_shell_reads_the_command_as_it_was_given(config):
    overrides = ["data.train.path=it's here/*.jsonl", "train.steps=4"]
    job = make_job(config, overrides, nodes=1, retries=0, name=None)
    expected = ["jaxtrain", "train", "/etc/c.yaml", *overrides]
    assert job.command(["jaxtrain"], "/etc/c.yaml") == expected
    assert shlex.split(shell_words(expected)) == expected


def test_a_name_becomes_a_label():
    assert dns_label("Qwen3_8B.sft", 40) == "qwen3-8b-sft"
    for name in ("8b", "___", "a" * 41):
        with pytest.raises(ValueError, match="--name"):
            dns_label(name, 40)
