"""A run is resumed only with its config, and a refused start changes no byte."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import date
from pathlib import Path

import hf_folders
import numpy as np
import pytest
import yaml

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.config import dump_config, load_config, parse_config
from jaxtrain.data.arithmetic import write_arithmetic
from jaxtrain.recipes import rl, sft
from jaxtrain.session import folder
from jaxtrain.session.export import export_run
from jaxtrain.session.folder import open_run
from jaxtrain.session.record import CHANGES, CONFIG, effective_config, read_saved_run, write_atomically
from jaxtrain.train.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data, two base checkpoints with a tokenizer, and `done`: a run with LoRA that has finished."""
    folder = tmp_path_factory.mktemp("open")
    write_arithmetic(folder, train_rows=60, eval_rows=8, seed=0)
    shutil.copy(folder / "train.jsonl", folder / "same.jsonl")
    write_arithmetic(folder / "other", train_rows=60, eval_rows=8, seed=1)
    for seed, name in enumerate(("base", "base2")):
        model = hf_folders.hf_model("llama", seed, vocab_size=259, num_hidden_layers=1)
        model.save_pretrained(folder / name)
        write_byte_tokenizer(folder / name)
    assert sft.run(config_of(folder, "done")).exit_code == 0
    return folder


def tree_of(place: Path, run: str, **changes) -> dict:
    """`changes`: dotted keys, with `__` for the dots."""
    tree = {
        "recipe": "sft",
        "run": {"dir": str(place / run)},
        "model": {
            "path": str(place / "base"),
            "lora": {"rank": 2, "alpha": 4.0},
            "compute_dtype": "float32",
            "remat": "none",
        },
        "data": {"train": {"path": str(place / "train.jsonl")}, "max_length": 64},
        "train": {"steps": 2, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-2},
        "log": {"every": 1, "to": []},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return tree


def config_of(place: Path, run: str, **changes):
    return parse_config(tree_of(place, run, **changes), "test")


def settled(config):
    """With what a run settles by itself at its start: the date of its chat template."""
    return config.model_copy(update={"data": config.data.model_copy(update={"date": date.today().isoformat()})})


@pytest.fixture
def done(place, tmp_path) -> Path:
    """A copy of the complete run, under the name that `config_of(place, ...)` uses."""
    shutil.copytree(place / "done", tmp_path / "run")
    return tmp_path / "run"


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


REFUSED = {
    "model.lora.alpha: 4.0 -> 8.0": {"model__lora__alpha": 8.0},
    "model.path: .*base2": {"model__path": "base2"},
    "data.train.path: .*other": {"data__train__path": "other/train.jsonl"},
    "optimizer.learning_rate: 0.01 -> 0.02": {"optimizer__learning_rate": 0.02},
    "run.seed: 0 -> 1": {"run__seed": 1},
    "data.loss_on: ": {"data__loss_on": "all"},
    "train.batch_size: 8 -> 16": {"train__batch_size": 16},
    "data.packing: true -> false": {"data__packing": False},
    "model.lora: .* -> null": {"model__lora": None},
    "train.steps: 2 -> 4": {"train__steps": 4},  # under a cosine schedule
    "data.train.columns.prompt: null -> ": {"data__train__columns": {"prompt": "question"}},
}


def test_the_day_on_which_a_run_began_is_its_date(place, done):
    """Chat templates that write the date would else change the ids from day to day."""
    assert effective_config(done).data.date == date.today().isoformat()
    text = (done / CONFIG).read_text()
    (done / CONFIG).write_text(text.replace(date.today().isoformat(), "2020-02-03"))
    with open_run(config_of(place, str(done))) as folder:
        assert folder.config.data.date == "2020-02-03"
    with (
        pytest.raises(ValueError, match=r'data\.date: "2020-02-03" -> "2020-02-04"'),
        open_run(config_of(place, str(done), data__date="2020-02-04")),
    ):
        pass


@pytest.mark.parametrize("message", REFUSED)
def test_a_config_that_changes_the_numbers_is_refused_with_the_difference(place, done, message):
    changes = dict(REFUSED[message])
    for key in ("model__path", "data__train__path"):
        if key in changes:
            changes[key] = str(place / changes[key])
    before = content(done)
    with pytest.raises(ValueError, match=message) as error:
        sft.run(config_of(place, str(done), **changes))
    assert "--allow-change " + message.partition(":")[0] in str(error.value)
    assert len(str(error.value).splitlines()) == 3  # one difference
    assert content(done) == before


def test_the_values_of_a_models_config_are_compared_one_by_one(place, tmp_path):
    shape = json.loads((place / "base" / "config.json").read_text())
    begun = tree_of(place, str(tmp_path / "run"), model__path=None, model__config=shape | {"rope_theta": 1e4})
    begun["model"] |= {"tokenizer": str(place / "base"), "lora": None}
    assert sft.run(parse_config(begun, "test")).exit_code == 0
    begun["model"]["config"]["rope_theta"] = 2e4
    with pytest.raises(ValueError, match=r"model\.config\.rope_theta: 10000\.0 -> 20000\.0"):
        sft.run(parse_config(begun, "test"))


def test_what_does_not_change_the_numbers_may_change(place, done, monkeypatch):
    monkeypatch.chdir(place)
    before = content(done)
    changes = {
        "train__microbatches": 1,
        "mesh": {"data": 2},
        "checkpoint": {"every": 1, "keep": 5},
        "log__every": 7,
        "eval__every": 3,
        "data__workers": 1,
        "model__remat": "full",
        "model__path": "base",
        "data__train__path": "./same.jsonl",  # another path to the same rows
    }
    with open_run(config_of(place, str(done), **changes)) as folder:
        assert folder.path == done
    assert content(done) == before


def test_train_steps_may_grow_with_a_constant_schedule_and_config_yaml_is_kept(place):
    run = place / "longer"
    assert sft.run(config_of(place, "longer", optimizer__schedule="constant")).exit_code == 0
    written = (run / CONFIG).read_bytes()
    again = config_of(place, "longer", optimizer__schedule="constant", train__steps=3)
    assert "loss" in sft.run(again).metrics
    assert (run / CONFIG).read_bytes() == written
    with pytest.raises(ValueError, match=r"train\.steps: 2 -> 1"):
        sft.run(config_of(place, "longer", optimizer__schedule="constant", train__steps=1))


def test_a_permitted_change_is_recorded_with_its_step_and_becomes_the_runs_config(place, done):
    changed = config_of(place, str(done), train__steps=3, optimizer__learning_rate=0.02)
    with pytest.raises(ValueError, match=r"--allow-change train\.steps$"):
        sft.run(changed, allow_change=["optimizer"])  # a section covers its keys, and no others
    written = (done / CONFIG).read_bytes()
    assert sft.run(changed, allow_change=["optimizer.learning_rate", "train.steps"]).exit_code == 0
    (line,) = [json.loads(line) for line in (done / CHANGES).read_text().splitlines()]
    assert line["step"] == 2
    assert line["changes"]["optimizer.learning_rate"] == {"old": 0.01, "new": 0.02}
    assert line["changes"].keys() == {"optimizer.learning_rate", "train.steps"}
    assert (done / CONFIG).read_bytes() == written
    assert effective_config(done).optimizer.learning_rate == 0.02
    assert read_saved_run(done).config == settled(changed)
    assert read_saved_run(done, 2).config.optimizer.learning_rate == 0.01
    sft.run(changed)  # without the option
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate: 0\.02 -> 0\.01"):
        sft.run(config_of(place, str(done)))


def test_a_key_to_change_that_does_not_exist_is_named(place, done):
    with pytest.raises(ValueError, match=r"--allow-change model\.lora\.alhpa: no such key; did you mean model\.lora"):
        sft.run(config_of(place, str(done)), allow_change=["model.lora.alhpa"])


def test_a_resume_with_other_versions_of_packages_is_said(place, tmp_path, monkeypatch, caplog):
    versions = folder._versions()
    with monkeypatch.context() as older:
        older.setattr(folder, "_versions", lambda: versions | {"jax": "0.1.2"})
        sft.run(config_of(place, str(tmp_path / "run"), optimizer__schedule="constant"))
    assert "other versions" not in caplog.text
    sft.run(config_of(place, str(tmp_path / "run"), optimizer__schedule="constant", train__steps=3))
    assert f"with other versions (jax 0.1.2 -> {versions['jax']})" in caplog.text


@pytest.mark.parametrize("key", ["data.train.path", "model.path"])
def test_other_files_under_the_same_path_are_refused(place, done, key, tmp_path):
    for name in ("base", "train.jsonl"):
        (shutil.copytree if name == "base" else shutil.copy)(place / name, tmp_path / name)
    paths = {"model__path": str(tmp_path / "base"), "data__train__path": str(tmp_path / "train.jsonl")}
    moved = config_of(place, str(done), **paths)
    with open_run(moved):  # the same content elsewhere
        pass
    (done / CONFIG).write_text(dump_config(moved))
    with open_run(moved):
        pass
    if key == "model.path":
        shutil.copy(place / "base2" / "model.safetensors", tmp_path / "base")
    else:
        (tmp_path / "train.jsonl").write_text((place / "train.jsonl").read_text().replace("7", "8"))
    before = content(done)
    with pytest.raises(ValueError, match=rf"{key}: .*has other content"):
        sft.run(moved)
    assert content(done) == before


def test_a_complete_run_prints_a_message_and_changes_nothing(place, done, capsys):
    before = content(done)
    assert sft.run(config_of(place, str(done))).exit_code == 0
    assert f"the run in {done} is finished: it has 2 steps" in capsys.readouterr().out
    assert content(done) == before


@pytest.mark.parametrize("length", [{"train__epochs": 2}, {"data__train__epochs": 2}], ids=str)
def test_a_run_given_by_epochs_is_finished_too(place, length, capsys, request):
    name = f"short-{request.node.callspec.id}"
    short = config_of(place, name, data__train__limit=20, train__steps=None, **length)
    assert sft.run(short).exit_code == 0
    before = content(place / name)
    assert sft.run(short).exit_code == 0
    assert "is finished: it has" in capsys.readouterr().out
    assert content(place / name) == before


def test_another_recipe_is_refused_in_one_line(place, done):
    before = content(done)
    tree = tree_of(place, str(done), rl={"rewards": [{"function": "exact_answer"}], "max_completion_length": 8})
    tree |= {"recipe": "rl", "train": {"steps": 2}}
    with pytest.raises(ValueError, match="holds a run of recipe sft, but this config has recipe rl") as error:
        rl.run(parse_config(tree, "test"), allow_change=["recipe"])
    assert "\n" not in str(error.value)
    assert content(done) == before


def test_a_run_without_a_checkpoint_accepts_another_config(place, tmp_path):
    """Also if the first batch fails: the run's folder accepts the corrected config."""
    (tmp_path / "bad.jsonl").write_text('{"prompt": \n')
    run = str(tmp_path / "run")
    with pytest.raises(ValueError, match="bad"):
        sft.run(config_of(place, run, data__train__path=str(tmp_path / "bad.jsonl")))
    with pytest.raises(ValueError, match="nowhere"):
        sft.run(config_of(place, str(tmp_path / "second"), model__path="nowhere", model__tokenizer=str(place / "base")))
    assert not (tmp_path / "second").exists()
    assert sft.run(config_of(place, run)).exit_code == 0
    assert effective_config(tmp_path / "run") == settled(config_of(place, run))


HOLDER = """
import sys, time
from datetime import date
from pathlib import Path
from jaxtrain.session.lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_only_one_run_at_a_time_uses_the_folder(place, done):
    before = content(done)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(done)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"is in use by process {holder.pid} on host {os.uname().nodename}"):
            sft.run(config_of(place, str(done)))
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert sft.run(config_of(place, str(done))).exit_code == 0
    after = content(done)
    assert {name: hash for name, hash in after.items() if name != ".lock"} == {
        name: hash for name, hash in before.items() if name != ".lock"
    }


def test_an_export_has_the_config_of_its_checkpoint(place, done, tmp_path):
    export_run(done, tmp_path / "expected")
    expected = hf_folders.tensors(tmp_path / "expected")
    edited = yaml.safe_load((done / CONFIG).read_text())
    edited["model"] |= {"lora": edited["model"]["lora"] | {"alpha": 400.0}, "path": str(place / "base2")}
    write_atomically(done / CONFIG, yaml.safe_dump(edited))
    export_run(done, tmp_path / "out")
    found = hf_folders.tensors(tmp_path / "out")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_without_a_config_uses_the_folders_config_with_a_warning(place, done, monkeypatch):
    monkeypatch.setattr(Checkpoints, "read_meta", lambda self, step=None: (2, {"num_tokens": 1}))
    with pytest.warns(RuntimeWarning, match=r"the config in the checkpoint of step 2 cannot be read, so config\.yaml"):
        assert read_saved_run(done).config == load_config(done / CONFIG)


def test_an_export_refuses_to_merge_into_another_base(place, tmp_path):
    shutil.copytree(place / "base", tmp_path / "base")
    run = tmp_path / "run"
    assert sft.run(config_of(place, str(run), model__path=str(tmp_path / "base"))).exit_code == 0
    shutil.copy(place / "base2" / "model.safetensors", tmp_path / "base")
    with pytest.raises(ValueError, match=r"which has changed since: model\.safetensors has other content"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


OBJECTIVE = """
from dataclasses import dataclass

import jax.numpy as jnp

from jaxtrain.objectives import Logp
from jaxtrain.types import Mean


@dataclass(frozen=True)
class Scaled:
    scale: float

    needs = (Logp(),)
    signals = ()
    separable = True

    def __call__(self, scores, batch, norm):
        loss = -self.scale * jnp.sum(scores.logp * batch.loss_weights) / jnp.maximum(norm.tokens, 1)
        return loss, {"loss": Mean(loss, 1.0)}
"""


def test_an_objective_of_the_users_own_trains_is_bound_to_its_fields_and_is_not_needed_for_an_export(place, tmp_path):
    (tmp_path / "mine.py").write_text(OBJECTIVE)
    objective = {"name": f"{tmp_path / 'mine.py'}:Scaled", "scale": 3.0}
    run = tmp_path / "run"
    assert sft.run(config_of(place, str(run), objective=objective)).exit_code == 0
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    plain = [json.loads(line)["loss"] for line in (place / "done" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(3 * plain[0], rel=1e-4)
    with pytest.raises(ValueError, match=r"objective\.scale: 3\.0 -> 2\.0"):
        sft.run(config_of(place, str(run), objective=objective | {"scale": 2.0}, train__steps=4))
    (tmp_path / "mine.py").unlink()
    code = f"from jaxtrain import export_run; export_run({str(run)!r}, {str(tmp_path / 'export')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "export" / "model.safetensors").is_file() and "warning" not in done.stderr.lower()
