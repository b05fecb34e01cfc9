"""The whole recipe as a user runs it: the command in a process of its own, the run folder afterwards."""

import json
import shutil
import signal
import socket
from pathlib import Path

import commands
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.data.arithmetic import write_arithmetic
from jaxtrain.session.export import export_run

STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a config, data and a tokenizer; the processes of all tests share their compiled programs."""
    folder = tmp_path_factory.mktemp("sft")
    write_byte_tokenizer(folder / "tokenizer")
    files = write_arithmetic(folder, train_rows=200, eval_rows=20, seed=0)
    config = {
        "recipe": "sft",
        "run": {"dir": str(folder / "whole")},
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": 259,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "hidden_act": "silu",
                "tie_word_embeddings": False,
            },
            "tokenizer": str(folder / "tokenizer"),
            "compute_dtype": "float32",
        },
        "data": {"train": {"path": str(files.train)}, "eval": {"path": str(files.eval)}, "max_length": 128},
        "train": {"steps": STEPS, "batch_size": 8, "microbatches": 1},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "checkpoint": {"every": 4},
        "eval": {"every": 6},
        "log": {"every": 1, "tensorboard": False},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    return folder


def train(place: Path, *overrides: str, devices: int = 8) -> str:
    return commands.train(place / "sft.yaml", *overrides, devices=devices)


def logged(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = ("tokens_per_second", "peak_memory_gib", "mfu")
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]


def interrupt(place: Path, run: Path, how: signal.Signals, *overrides: str) -> int:
    """End a run past its first checkpoint."""
    return commands.interrupt(place / "sft.yaml", run, how, *overrides, lines=range(5, STEPS - 1))


def weights(run: Path, out: Path) -> dict[str, np.ndarray]:
    export_run(run, out)
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """The uninterrupted run, on eight devices."""
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
    ("mesh", "devices"),
    [(["mesh.preset=fsdp_tensor", "mesh.tensor=2"], 8), (["mesh.data=2"], 4), ([], 1)],
    ids=["fsdp4-tensor2", "data2-fsdp2", "single"],
)
def test_resumed_on_another_mesh_sees_the_same_batches(place, whole, mesh, devices):
    run = place / f"other-{devices}-{len(mesh)}"
    shutil.copytree(place / "found", run)
    train(place, f"run.dir={run}", *mesh, devices=devices)
    exact = ("step", "num_tokens", "packing_density", "learning_rate")
    for line, expected in zip(logged(run), logged(whole), strict=True):
        assert [line.get(name) for name in exact] == [expected.get(name) for name in exact]
        for name in ("loss", "eval_loss", "grad_norm"):
            if name in expected:
                assert line[name] == pytest.approx(expected[name], rel=1e-3), (line["step"], name)


def test_two_hosts_train_as_one_does_and_one_goes_on_from_their_checkpoint(place, whole):
    run = place / "hosts"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    short = (f"run.dir={run}", "optimizer.schedule=constant")
    command = (place / "sft.yaml", *short, "train.steps=6")
    hosts = [commands.start(*command, devices=4, JAX_PROCESS_ID=str(host), **cluster) for host in range(2)]
    outputs = [host.communicate(timeout=600)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    train(place, *short)

    train(place, *short[1:], f"run.dir={place / 'host'}")
    assert len(logged(run)) == len(logged(place / "host"))
    for line, expected in zip(logged(run), logged(place / "host"), strict=True):
        for name in ("step", "num_tokens", "packing_density"):
            assert line.get(name) == expected.get(name)
        for name in ("loss", "eval_loss", "grad_norm"):
            if name in expected:
                assert line[name] == pytest.approx(expected[name], rel=1e-3), (line["step"], name)


def test_what_one_host_refuses_all_refuse(place, whole):
    """Only the first process looks into the folder; the others must not wait for it."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    command = (place / "sft.yaml", "run.seed=1")
    hosts = [commands.start(*command, devices=4, JAX_PROCESS_ID=str(host), **cluster) for host in range(2)]
    outputs = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [2, 2], outputs
    assert all("run.seed: 0 -> 1" in output for output in outputs)


def test_a_finished_run_is_left_alone_and_a_new_one_wants_a_new_folder(place, whole):
    before = logged(whole)
    assert "is finished: train.steps=12" in train(place)
    assert logged(whole) == before
    process = commands.start(place / "sft.yaml", "--no-resume")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "holds checkpoints up to step 12" in output
    assert "Traceback" not in output


def test_a_run_whose_data_is_exhausted_is_saved_where_it_ended(place):
    run = place / "dry"
    output = train(place, f"run.dir={run}", "data.train.epochs=1", "data.train.limit=60", "log.every=100")
    assert "is exhausted after step" in output
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


def test_a_run_says_that_its_updates_are_lost_to_rounding(place):
    run = place / "rounded"
    output = train(
        place, f"run.dir={run}", "model.param_dtype=bfloat16", "optimizer.learning_rate=1e-6", "train.steps=3"
    )
    assert output.count("of the updates were lost to rounding") == 1
    assert "model.param_dtype=float32" in output
    assert all(line["updates_lost_to_rounding"] > 0.9 for line in logged(run) if "loss" in line)
    assert not any("updates_lost_to_rounding" in line for line in logged(place / "whole"))
