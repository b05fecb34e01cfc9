"""Options of a backend: from a file and assignments, as text, and unknown ones refused."""

import pytest

from jaxtrain.config import ConfigError
from jaxtrain.launch import backend_class


def test_assignments_win_over_the_file_and_values_are_text(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("partition: gpu\ntime: 12:00:00\nexclusive: true\ncpus_per_task: 8\nenv: {NCCL_DEBUG: 1}\n")
    backend = backend_class("slurm").from_options(file, ["partition=small", "env={A: 010}", "mem=0"])
    assert backend.model_dump(exclude_defaults=True) == {
        "partition": "small",
        "time": "12:00:00",  # YAML reads it as 43200
        "exclusive": True,
        "cpus_per_task": 8,
        "env": {"A": "010"},
        "mem": "0",
    }


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("slurm", "partitions=gpu", "unknown option partitions of this backend; did you mean partition"),
        ("local", "zone=1", "unknown option zone of this backend; known are env"),
        ("slurm", "cpus_per_task=many", "option cpus_per_task: .*integer"),
        ("jobset", "queue=q", "option image: Field required"),
        ("ray", "address", "not of the form key=value"),
        ("ray", "env={", "option env is not valid YAML"),
    ],
)
def test_a_wrong_option_is_refused(name, option, message):
    with pytest.raises(ConfigError, match=message):
        backend_class(name).from_options(None, [option])


def test_a_file_of_options_is_a_mapping(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("- partition\n")
    with pytest.raises(ConfigError, match=r"cluster\.yaml must be a mapping"):
        backend_class("slurm").from_options(file)
