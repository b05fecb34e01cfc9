"""`jaxtrain plan`, from a file to its report."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import recipe_runs
import yaml

from jaxtrain.config import load_config
from jaxtrain.plan.planner import beside, plan
from jaxtrain.plan.prices import DCN
from jaxtrain.plan.programs import Program

MODEL = {
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}


class _EnoughSeenError(Exception):
    pass


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu, so nothing can be compiled for TPU: install jax[tpu]"
)


def test_a_plan_for_cpus_has_memory_and_no_time(tmp_path):
    config = load_config(recipe_runs.prepare(tmp_path, "sft") / "run.yaml")
    seen = []
    made = plan(config, "cpu:8", first=lambda target, found: seen.append(found), save=tmp_path / "out")
    assert seen == [made.estimate]
    assert made.fits is None
    assert made.seconds is None
    assert made.used > made.estimate.parameter_bytes
    saved = json.loads((tmp_path / "out/update.json").read_text())
    assert saved["args"] == made.update.compiled.arguments
    assert saved["case"]["rows"] == 8
    assert json.dumps(made.as_json(10))


def test_in_phases_optimizer_and_engine_are_not_in_memory_together():
    def program(name, **inputs):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        held = {kind: jax.ShapeDtypeStruct((size,), np.int8, sharding=sharding) for kind, size in inputs.items()}
        return Program(name, None, held, mesh, 0.0, 0, 0, lambda place: None)

    engine = {"engine's parameters": 4, "cache": 8}
    programs = [
        program("merge", parameters=1),
        program("decode", **engine),
        program("update", parameters=1, optimizer=2),
    ]
    kept = [beside(each, programs, phased=False) for each in programs]
    phased = [beside(each, programs, phased=True) for each in programs]
    assert kept == [
        {"engine's parameters": 4, "cache": 8, "optimizer": 2},
        {"parameters": 1, "optimizer": 2},
        {"engine's parameters": 4, "cache": 8},
    ]
    assert phased == [{}, {"parameters": 1}, {}]


def test_an_estimate_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtrain.plan.planner.compile_program", lambda *given: pytest.fail("compiled"))
    made = plan(load_config(recipe_runs.prepare(tmp_path, "sft") / "run.yaml"), "v5p:4x4x8", compiled=False)
    assert made.estimate.seconds > 0
    assert made.phases == ()


def test_options_of_a_tpus_compiler_do_not_prevent_the_estimate(tmp_path):
    overrides = ["model.compiler_options={xla_enable_async_all_gather: true}"]
    config = load_config(recipe_runs.prepare(tmp_path, "sft") / "run.yaml", overrides)
    assert plan(config, "v5p:4x4x8", compiled=False).estimate.parameters > 0


def test_the_runs_own_options_of_the_compiler_are_planned(tmp_path, monkeypatch):
    overrides = ["model.compiler_options={xla_cpu_enable_fast_math: true}"]
    config = load_config(recipe_runs.prepare(tmp_path, "sft") / "run.yaml", overrides)
    given, jit = [], jax.jit

    def seen(*functions, **named):
        given.append(named.get("compiler_options"))
        return jit(*functions, **named)

    def options_of(lowered, target, options):
        assert options == {"xla_cpu_enable_fast_math": True}
        raise _EnoughSeenError

    monkeypatch.setattr(jax, "jit", seen)
    monkeypatch.setattr("jaxtrain.plan.planner.compile_program", options_of)
    with pytest.raises(_EnoughSeenError):
        plan(config, "cpu:8")
    assert {"xla_cpu_enable_fast_math": True} in given


def test_a_folder_needs_no_weights(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    tree = yaml.safe_load((recipe_runs.prepare(tmp_path, "sft") / "run.yaml").read_text())
    tree["model"] = {"path": str(folder)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    made = plan(load_config(tmp_path / "run.yaml"), "v5p:2x2x2", compiled=False)
    assert made.estimate.parameters > 1e6


def planned(tmp_path: Path, tree: dict, *options: str) -> dict:
    """The JSON of the command, in a process of its own: libtpu looks for its machine when it is loaded."""
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(tree))
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "jaxtrain.cli", "plan", str(tmp_path / "plan.yaml"), *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def tree(**sections) -> dict:
    return {
        "recipe": "sft",
        "model": {"config": MODEL},
        "data": {"train": {"path": "data.jsonl"}, "max_length": 512},
        "train": {"steps": 10, "batch_size": 8},
    } | sections


@needs_libtpu
def test_a_step_is_planned_for_a_tpu(tmp_path):
    made = planned(tmp_path, tree(), "--on", "v5p:2x2x2", "--save", str(tmp_path), "--profile")
    assert made["fits"]
    assert 0 < made["mfu"] < 1
    update = made["programs"]["update"]
    parts = sum(update[name] for name in ("fusion_seconds", "kernel_seconds", "exposed_seconds"))
    assert made["step_seconds"] == pytest.approx(parts)
    assert update["kernel_seconds"] > 0  # splash attention
    assert {each["axes"] for each in update["collectives"]} == {"fsdp"}
    assert any("nn/" in part["where"] for part in update["profile"])
    assert "splash_mha_fwd" in (tmp_path / "update.hlo").read_text()


LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
QWEN_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
QWEN = MODEL | QWEN_8B | {"vocab_size": 151936, "num_key_value_heads": 8}
MIXTURE = {
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "hidden_act": "silu",
    "attention_bias": True,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
TPU_CONFIGS = {  # file -> the model, the devices, and the parameters on the model's card
    "qwen3_8b_v5p8": (QWEN, "v5p:2x2x2", 8.2e9),
    "llama31_8b_v6e16": (LLAMA | LLAMA_8B, "v6e:4x4", 8.03e9),
    "llama33_70b_v5p128": (LLAMA | LLAMA_70B, "v5p:4x4x8", 70.6e9),
    "qwen3_8b_grpo_v5p4": (QWEN, "v5p:2x2x1", 8.2e9),
    "gpt_oss_20b_v5p64": (GPT_OSS, "v5p:4x4x4", 20.9e9),
    "qwen3_30b_a3b_v6e64": (QWEN | MIXTURE | {"model_type": "qwen3_moe"}, "v6e:8x8", 30.5e9),
}
QWEN_06B = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
QWEN_25 = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
QWEN_25 |= {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "attention_bias": True}
GPU_CONFIGS = {
    "qwen3_06b_h100": (QWEN | QWEN_06B | {"tie_word_embeddings": True}, "h100:1", 0.596e9),
    "qwen3_8b_h100x8": (QWEN, "h100:8", 8.2e9),
    "llama31_8b_lora_h100": (LLAMA | LLAMA_8B, "h100:1", 8.03e9),
    "qwen25_7b_lora_h100": (MODEL | QWEN_25, "h100:1", 7.62e9),
}
CONFIGS = Path(__file__).parents[2] / "configs"
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="no CUDA plugin of JAX, so nothing can be compiled for GPUs: install jax[cuda13]",
)


def accelerator_config(tmp_path: Path, name: str, **changes: object) -> Path:
    """A file of configs/tpu or configs/gpu, with a folder for its model that holds config.json alone."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps((TPU_CONFIGS | GPU_CONFIGS)[name][0] | changes))
    folder = "tpu" if name in TPU_CONFIGS else "gpu"
    whole = yaml.safe_load((CONFIGS / folder / f"{name}.yaml").read_text())
    whole["model"]["path"] = str(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(whole))
    return tmp_path / "run.yaml"


SLICES = [
    ("v5p:2x2x1", ["--slices", "2", "mesh.data=2"], {"data", "fsdp"}),
    ("tpu7x:2x2x1", [], {"fsdp"}),
]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("on", "options", "axes"), SLICES, ids=["two slices", "two devices a chip"])
def test_slices_and_chips_of_two_devices_are_planned(tmp_path, on, options, axes):
    made = planned(tmp_path, tree(), "--on", on, *options)
    assert made["devices"] == 8
    assert made["fits"]
    assert 0 < made["mfu"] < 1
    collectives = made["programs"]["update"]["collectives"]
    assert set("+".join(each["axes"] for each in collectives).split("+")) - {"none"} == axes
    between = [each for each in collectives if "data" in each["axes"].split("+")]
    assert all(each["seconds"] >= each["bytes"] / 2 / DCN for each in between if each["kind"] == "all-reduce")


def test_every_config_for_tpus_is_planned():
    for folder, known in (("tpu", TPU_CONFIGS), ("gpu", GPU_CONFIGS)):
        assert {path.stem for path in (CONFIGS / folder).glob("*.yaml")} == known.keys()


@pytest.mark.parametrize("name", TPU_CONFIGS | GPU_CONFIGS)
def test_the_state_of_the_configs_for_accelerators_fits_with_room(tmp_path, name):
    _, on, parameters = (TPU_CONFIGS | GPU_CONFIGS)[name]
    config = load_config(accelerator_config(tmp_path, name))
    made = plan(config, on, compiled=False)
    adapters = made.estimate.trained if config.model.lora else 0
    assert made.estimate.parameters - adapters == pytest.approx(parameters, rel=0.005)
    assert made.estimate.bytes < made.target.chip.hbm / 2


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("llama31_8b_v6e16", marks=pytest.mark.big), "qwen3_8b_grpo_v5p4", "gpt_oss_20b_v5p64"]
)
def test_the_configs_for_tpus_compile_at_real_widths(tmp_path, name):
    """Two layers, for their time: all layers are one loop."""
    few = {"num_hidden_layers": 2}
    if "layer_types" in TPU_CONFIGS[name][0]:
        few["layer_types"] = TPU_CONFIGS[name][0]["layer_types"][:2]
    whole = yaml.safe_load(accelerator_config(tmp_path, name, **few).read_text())
    made = planned(tmp_path, whole, "--on", TPU_CONFIGS[name][1])
    assert made["fits"]
    assert 0.1 < made["mfu"] < 0.8


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_a_gpu_config_compiles_with_cudnns_attention(tmp_path, name):
    whole = yaml.safe_load(accelerator_config(tmp_path, name, num_hidden_layers=2).read_text())
    made = planned(tmp_path, whole, "--on", GPU_CONFIGS[name][1], "--profile")
    assert made["fits"]
    assert 0.1 < made["mfu"] < 0.8
    assert made["programs"]["update"]["kernel_seconds"] > 0  # of cuDNN


@needs_libtpu
@pytest.mark.slow
def test_every_phase_of_a_colocated_rollout_is_planned_for_a_tpu(tmp_path):
    rl = {"prompts": 2, "generations": 2, "max_completion_length": 256, "rewards": [{"function": "exact_answer"}]}
    rl["slots"] = 4  # a row for each device: the compiler takes three times as long for 16
    whole = tree(recipe="rl", rl=rl, objective={"beta": 0.04}, train={"steps": 10})
    made = planned(tmp_path, whole, "--on", "v5p:2x2x1")
    assert made["programs"].keys() == {"merge", "reshard", "prefill", "decode", "reference", "update"}
    decode = made["programs"]["decode"]
    assert decode["times"] == 256
    assert decode["memory"]["optimizer"] > 0  # which waits beside the engine
    assert made["step_seconds"] == pytest.approx(sum(each["seconds"] for each in made["programs"].values()))
