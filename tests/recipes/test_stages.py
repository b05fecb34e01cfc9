"""Stages: each starts from the export of the one before, and can be interrupted and used alone."""

import signal

import commands
import pytest
from recipe_runs import prepare_stages
from safetensors.numpy import load_file

from jaxtrain.config.stages import load_stages
from jaxtrain.recipes.run import run, run_file
from jaxtrain.session.export import export_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return prepare_stages(tmp_path_factory.mktemp("stages"))


def test_stages_run_report_and_go_on_where_they_were_killed(place):
    config = place / "stages.yaml"
    folder = place / "pipeline"
    process = commands.start(config)
    while process.poll() is None and not (folder / "dpo" / "metrics.jsonl").exists():
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=600)
    output = commands.train(config)
    assert "is finished" in output  # the first stage is not run again
    report = (folder / "report.md").read_text()
    assert "## sft (sft): step 4, exported" in report and "## dpo (preference): step 6, exported" in report
    # The second stage alone, from the first one's export, is the same run.
    _, dpo = load_stages(config)
    alone = dpo.config.model_copy(update={"run": dpo.config.run.model_copy(update={"dir": str(place / "alone")})})
    run(alone)
    export_run(place / "alone", place / "alone export")
    first, second = (load_file(where / "model.safetensors") for where in (dpo.export, place / "alone export"))
    assert all((first[name] == second[name]).all() for name in first) and first.keys() == second.keys()


def test_a_stage_that_goes_on_is_exported_again(place):
    """Not the export of fewer steps, which the next stage would start from."""
    config, more = place / "stages.yaml", ["run.dir=" + str(place / "more")]
    assert run_file(config, more) == 0
    sft, _ = load_stages(config, more)
    before = load_file(sft.export / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.path: .*, but model\.safetensors has other content"):
        run_file(config, [*more, "sft.train.steps=6"])
    export_run(sft.folder, place / "newest")
    after, newest = (load_file(folder / "model.safetensors") for folder in (sft.export, place / "newest"))
    assert all((after[name] == newest[name]).all() for name in newest)
    assert any((after[name] != before[name]).any() for name in before)


def test_stages_on_two_processes(place):
    more = f"run.dir={place / 'two'}"
    commands.Job(place, 2, [["train", str(place / "stages.yaml"), more]], devices=2).finish()
    report = (place / "two" / "report.md").read_text()
    assert "## sft (sft): step 4, exported" in report and "## dpo (preference): step 6, exported" in report
    first, second = (
        load_file(stage.export / "model.safetensors") for stage in load_stages(place / "stages.yaml", [more])
    )
    assert first.keys() == second.keys() and any((first[name] != second[name]).any() for name in first)
