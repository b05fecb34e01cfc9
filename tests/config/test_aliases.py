"""Names of other frameworks, answered with the key and the value that mean the same here."""

from copy import deepcopy

import pytest

from jaxtrain.config import ConfigError, parse_config
from jaxtrain.config.aliases import ALIASES, VALUES

TREE = {"recipe": "sft", "model": {"path": "model"}, "data": {"train": {"path": "a.jsonl"}}}


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"num_train_epochs": 3}, "unknown key num_train_epochs; did you mean train.epochs?"),
        ({"bf16": True}, "unknown key bf16; did you mean model.compute_dtype: bfloat16?"),
        ({"model": {"path": "m", "load_in_4bit": True}}, "did you mean model.quantize: nf4?"),
        ({"report_to": "wandb"}, "did you mean log.to? (a list of tensorboard, wandb, mlflow and trackio)"),
        ({"eval": {"steps": 5}}, "unknown key eval.steps; did you mean eval.every?"),
        ({"train": {"steps": "1e3"}}, "train.steps: Input should be a valid integer (got '1e3')"),
        ({"recipe": "grpo"}, "(got 'grpo'); did you mean rl, with rl.algorithm: grpo?"),
        ({"recipe": "dpo"}, "(got 'dpo'); did you mean preference, with objective: DPO?"),
        (
            {"train": {"steps": "10"}},
            "train.steps: Input should be a valid integer (got '10'): write 10 without quotes",
        ),
        ({"optimizer": {"learning_rate": "1e-4"}}, "(got '1e-4'): write 1e-4 without quotes"),
        ({"train": {"steps": "[ten"}}, "train.steps: Input should be a valid integer (got '[ten')"),
        ({"model": {"path": "m", "lora": {"targets": "all-linear"}}}, "(got 'all-linear'); did you mean [all-linear]?"),
    ],
)
def test_what_users_of_other_frameworks_type_is_answered_with_key_and_value(given, answer):
    with pytest.raises(ConfigError) as raised:
        parse_config(TREE | given)
    assert str(raised.value).endswith(answer)


@pytest.mark.parametrize("name", VALUES)
def test_the_value_that_a_switch_stands_for_is_valid(name):
    key = ALIASES[name]
    lora = ["model.lora.rank=4"] if key.startswith(("model.lora", "model.quantize")) else []
    parse_config(deepcopy(TREE), overrides=[*lora, f"{key}={VALUES[name]}"])
