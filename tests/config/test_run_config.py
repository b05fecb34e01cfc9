import pytest
from pydantic import ValidationError

from jaxtrain.config.run_config import RunConfig

SFT = {"recipe": "sft", "model": {"path": "model"}, "data": {"train": {"path": "a.jsonl"}}}
RL = SFT | {"recipe": "rl", "rl": {"rewards": [{"function": "exact_answer"}]}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (SFT | {"eval": {"generate": 4}}, "eval.generate needs data.eval"),
        (SFT | {"rl": RL["rl"]}, "`recipe: rl` and the section `rl` belong together"),
        (SFT | {"optimizer": {"rounding": "stochastic"}}, "rounding=stochastic is .* model.param_dtype=float32"),
        (SFT | {"recipe": "rl"}, "`recipe: rl` and the section `rl` belong together"),
        (SFT | {"sampling": {}}, "recipe sft draws no samples"),
        (RL | {"mesh": {"context": 2}}, "mesh.context=2 splits the tokens of rows, .* recipe rl samples with"),
        (
            SFT | {"eval": {"generate": 4, "prompts": {"path": "b"}}, "mesh": {"context": 2}},
            "mesh.context=2 .* eval.generate samples with",
        ),
        (RL | {"sampling": {"temperature": 0.0}}, "sampling.temperature=0 is greedy"),
        (RL | {"sampling": {"top_k": 65}}, "sampling.top_k=65 is more than rl.support=64"),
        (RL | {"rl": RL["rl"] | {"max_completion_length": 2048}}, "leaves no room for a prompt"),
        (RL | {"model": {"path": "m", "lora": {"dropout": 0.1}}}, "model.lora.dropout=0.1 must be 0 with recipe rl"),
        (
            RL | {"rl": RL["rl"] | {"placement": {"staleness": 1}}, "objective": {"correction": None}},
            "rl.placement.staleness=1 needs objective.correction",
        ),
    ],
)
def test_sections_that_do_not_fit_together_are_refused(tree, message):
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(tree)


def test_the_objective_of_a_policy_has_the_length_and_temperature_of_its_samples():
    rl = RL["rl"] | {"algorithm": "dr_grpo", "max_completion_length": 77}
    config = RunConfig.model_validate(RL | {"rl": rl, "sampling": {"temperature": 0.7}, "objective": {"beta": 0.2}})
    assert (config.objective.max_completion_length, config.objective.temperature) == (77, 0.7)
    assert config.objective.aggregation == "dr_grpo"  # of the algorithm, whose other fields stay
    assert config.algorithm.objective == config.objective and config.objective.beta == 0.2


def test_a_run_that_nothing_ends_is_refused_when_it_starts():
    with pytest.raises(ValueError, match=r"give train\.steps or train\.epochs"):
        RunConfig.model_validate(SFT).check_length()
    for ends in ({"train": {"steps": 1}}, {"train": {"epochs": 1}}, {"data": {"train": {"path": "a", "epochs": 2}}}):
        RunConfig.model_validate(SFT | ends).check_length()


def test_keys_without_a_use_are_those_of_the_other_recipe():
    assert RunConfig.model_validate(SFT).unused == {}
    assert RunConfig.model_validate(RL).unused["train"] == {"batch_size"}


@pytest.mark.parametrize(("recipe", "rate"), [("sft", 2e-5), ("preference", 1e-6), ("reward", 2e-5), ("rl", 1e-6)])
def test_preferences_and_rewards_have_a_small_learning_rate_by_default(recipe, rate):
    tree = (RL if recipe == "rl" else SFT) | {"recipe": recipe}
    assert RunConfig.model_validate(tree).optimizer.learning_rate == rate
    given = tree | {"optimizer": {"learning_rate": 3e-4, "b2": 0.95}}
    assert RunConfig.model_validate(given).optimizer.learning_rate == 3e-4
