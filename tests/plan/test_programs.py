"""RunPlan compiles the programs of the run: the text of each is that of the real one, for every recipe."""

import jax
import pytest
import recipe_runs

from jaxtrain.config import load_config
from jaxtrain.plan.compile import compile_program
from jaxtrain.plan.programs import data_programs, without_weights
from jaxtrain.plan.report import Phase
from jaxtrain.recipes.run import run
from jaxtrain.roles.role import Role, TrainedRole

LORA = ["model.lora.rank=4", "model.lora.modules_to_save=[lm_head]"]


class _EnoughSeenError(Exception):
    pass


def programs_of_run(config, monkeypatch):
    """The lowered programs of the first step of a real run, by name; in it the step is not taken."""
    found = {}

    def score(role, key, batch, function):
        batch = role.place(batch)
        found[role.name] = role._jitted(key, function).lower(role.params, batch)
        return role._jitted(key, function)(role.params, batch)

    def update(role, batch):
        found["update"] = role.lower(batch)
        raise _EnoughSeenError

    with monkeypatch.context() as patches:
        patches.setattr(Role, "_score", score)
        patches.setattr(TrainedRole, "update", update)
        with pytest.raises(_EnoughSeenError):
            run(config)
    return found


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("sft", []),
        ("sft", ["mesh.preset=fsdp_tensor", "mesh.tensor=2", "train.microbatches=2", "model.remat=full"]),
        ("sft", [*LORA, "model.quantize=nf4"]),
        ("preference", []),
        ("preference", LORA),
        ("reward", []),
        ("distill", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "plain",
)
def test_the_planned_programs_are_those_of_the_run(tmp_path, monkeypatch, recipe, overrides):
    config = load_config(recipe_runs.prepare(tmp_path, recipe) / "run.yaml", overrides)
    planned = {program.name: program.lowered for program in data_programs(without_weights(config), jax.devices())}
    real = programs_of_run(config, monkeypatch)
    assert planned.keys() == real.keys()
    for name, lowered in planned.items():
        assert lowered.as_text() == real[name].as_text(), name


def test_planned_memory_is_that_of_the_compiled_step(tmp_path, monkeypatch):
    config = load_config(recipe_runs.prepare(tmp_path, "sft") / "run.yaml", ["mesh.data=2"])
    (program,) = data_programs(config, jax.devices())
    made = compile_program(program.lowered, "cpu cpu:8 1", {})
    memory = programs_of_run(config, monkeypatch)["update"].compile().memory_analysis()
    assert made.arguments == memory.argument_size_in_bytes
    assert made.temporaries == memory.temp_size_in_bytes
    assert made.outputs == memory.output_size_in_bytes
    assert made.aliased == memory.alias_size_in_bytes
    kinds = Phase(program, made, None).memory
    assert sum(kinds.values()) == made.arguments + made.temporaries
    assert kinds["optimizer"] == pytest.approx(2 * kinds["parameters"], rel=1e-3)  # two moments of AdamW


def test_the_head_is_walked_in_chunks_of_the_models_size(tmp_path):
    overrides = ["model.head_chunk=8", "train.microbatches=1"]
    config = load_config(recipe_runs.prepare(tmp_path, "sft") / "run.yaml", overrides)
    (program,) = data_programs(config, jax.devices())
    tokens_of_a_device = program.tokens / len(jax.devices())
    assert program.trips("ops/token_scores.py:1") == tokens_of_a_device / 8
    assert program.trips("nn/decoder.py:1") is None


def test_a_batch_that_does_not_divide_names_the_nearest(tmp_path):
    config = load_config(recipe_runs.prepare(tmp_path, "sft") / "run.yaml", ["train.batch_size=12"])
    with pytest.raises(ValueError, match=r"train.batch_size=12 rows do not divide .* nearest batch_size that does is"):
        data_programs(config, jax.devices())
