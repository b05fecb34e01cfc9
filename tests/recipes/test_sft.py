"""The recipe, also interrupted in a separate process, and its run folder."""

import shutil
import signal
from pathlib import Path

import commands
import numpy as np
import pytest
import yaml
from recipe_runs import logged
from safetensors.numpy import load_file

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.config import load_config
from jaxtrain.data.arithmetic import write_arithmetic
from jaxtrain.recipes import sft
from jaxtrain.session.export import export_run

STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a config, data and a tokenizer; the processes of all tests share the compilation cache."""
    folder = tmp_path_factory.mktemp("sft")
    write_byte_tokenizer(folder / "tokenizer")
    files = write_arithmetic(folder, train_rows=200, eval_rows=20, seed=0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
    config = {
        "recipe": "sft",
        "run": {"dir": str(folder / "whole")},
        "model": {
            "config": commands.MODEL | sizes,
            "tokenizer": str(folder / "tokenizer"),
            "compute_dtype": "float32",
        },
        "data": {"train": {"path": str(files.train)}, "eval": {"path": str(files.eval)}, "max_length": 128},
        "train": {"steps": STEPS, "batch_size": 8, "microbatches": 1},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "checkpoint": {"every": 4},
        "eval": {"every": 6},
        "log": {"every": 1, "to": []},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    return folder


def train(place: Path, *overrides: str, **options) -> None:
    """In this process, on eight devices."""
    assert sft.run(load_config(place / "sft.yaml", list(overrides)), **options).exit_code == 0


def interrupt(place: Path, run: Path, how: signal.Signals, *overrides: str) -> int:
    """Interrupt a run in a separate process after its first checkpoint."""
    return commands.interrupt(place / "sft.yaml", run, how, *overrides, lines=range(5, STEPS - 1))


def weights(run: Path, out: Path) -> dict[str, np.ndarray]:
    export_run(run, out)
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """The uninterrupted run."""
    train(place)
    return place / "whole"


def test_losses_fall_and_the_folder_holds_what_it_should(whole):
    lines = [line for line in logged(whole) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    names = {"loss", "grad_norm", "learning_rate", "num_tokens", "mean_token_accuracy", "entropy", "packing_density"}
    assert names <= lines[0].keys()
    assert lines[0]["num_tokens"] < lines[1]["num_tokens"] <= 2 * 8 * 128
    evaluations = [line for line in logged(whole) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [6, 12]
    assert evaluations[1]["eval_perplexity"] == pytest.approx(np.exp(evaluations[1]["eval_loss"]))
    assert (whole / "config.yaml").exists()


@pytest.mark.parametrize("accident", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_and_resumed_equals_uninterrupted(place, whole, accident, tmp_path):
    run = place / f"interrupted-{accident.name}"
    code = interrupt(place, run, accident)
    assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143}[accident]
    if accident == signal.SIGKILL:  # as it was found, for the test below
        shutil.copytree(run, place / "found")
    train(place, f"run.dir={run}")
    assert logged(run) == logged(whole)
    resumed, expected = weights(run, tmp_path / "resumed"), weights(whole, tmp_path / "whole")
    assert resumed.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(resumed[name], tensor, err_msg=name)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("fsdp4-tensor2", ["mesh={preset: fsdp_tensor, tensor: 2}"]), ("data2", ["mesh.data=2"]), ("single", [])],
)
def test_resumed_on_another_mesh_sees_the_same_batches(place, whole, name, mesh):
    run = place / name
    shutil.copytree(place / "found", run)
    if mesh:
        train(place, f"run.dir={run}", *mesh)
    else:
        commands.train(place / "sft.yaml", f"run.dir={run}", devices=1)
    assert_close(logged(run), logged(whole))


def assert_close(lines: list[dict], expected: list[dict]) -> None:
    """The same batches, and nearly the same numbers."""
    exact = ("step", "num_tokens", "packing_density", "learning_rate")
    for line, other in zip(lines, expected, strict=True):
        assert [line.get(name) for name in exact] == [other.get(name) for name in exact]
        for name in ("loss", "eval_loss", "grad_norm"):
            if name in other:
                assert line[name] == pytest.approx(other[name], rel=1e-3), (line["step"], name)


def test_two_hosts_equal_one_their_checkpoint_resumes_on_one_and_all_raise_the_error_of_the_first(place, whole):
    """Only the first process checks the folder; the others must not hang."""
    short = ("optimizer.schedule=constant", f"run.dir={place / 'hosts'}")
    file = str(place / "sft.yaml")
    job = commands.Job(place, 2, [["train", file, *short, "train.steps=6"], ["train", file, "run.seed=1"]])
    _, refused = job.finish(2)
    assert all("run.seed: 0 -> 1" in printed for printed in refused)
    train(place, *short)
    train(place, short[0], f"run.dir={place / 'host'}")
    assert_close(logged(place / "hosts"), logged(place / "host"))


def test_a_complete_run_is_not_trained_and_a_new_one_needs_a_new_folder(place, whole, capsys):
    before = logged(whole)
    train(place)
    assert "is finished: it has 12 steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds checkpoints up to step 12"):
        train(place, resume=False)
    assert logged(whole) == before


def test_a_run_of_an_epoch_is_evaluated_and_saved_where_it_ends(place, capsys):
    run = place / "dry"
    length = ("train.steps=null", "train.epochs=1", "data.train.limit=60")
    train(place, f"run.dir={run}", *length, "log.every=100")
    assert ", 1.00 epochs, 60 examples, " in capsys.readouterr().out
    last = logged(run)[-1]["step"]
    assert 0 < last < STEPS
    assert (run / "checkpoints" / str(last)).is_dir()
    assert {"loss", "eval_loss"} <= {name for line in logged(run) if line["step"] == last for name in line}


def test_lora_run_is_resumed_merged_and_served(place, whole, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run = place / "lora"
    lora = ["model.lora.rank=4", "optimizer.learning_rate=0.05", f"run.dir={run}"]
    assert interrupt(place, run, signal.SIGTERM, *lora[:2]) == 143
    train(place, *lora)
    losses = [line["loss"] for line in logged(run) if "loss" in line]
    assert losses[-1] < losses[0]
    export_run(run, tmp_path / "adapter", adapter=True)
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * 7 * 2  # factors, linears, layers
    export_run(run, tmp_path / "merged")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 1 + 1?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
    assert model.generate(ids, max_new_tokens=4).shape[1] > ids.shape[1]


def test_a_run_warns_of_updates_lost_to_rounding(place, whole):
    run = place / "rounded"
    narrow = ("model.param_dtype=bfloat16", "optimizer.learning_rate=1e-6", "train.steps=3")
    with pytest.warns(UserWarning, match=r"of the updates were lost to rounding.*model\.param_dtype=float32") as told:
        train(place, f"run.dir={run}", *narrow)
    assert sum("lost to rounding" in str(warning.message) for warning in told) == 1
    assert all(line["updates_lost_to_rounding"] > 0.9 for line in logged(run) if "loss" in line)
    assert not any("updates_lost_to_rounding" in line for line in logged(whole))
