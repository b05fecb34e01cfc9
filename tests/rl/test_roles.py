"""The critic is the policy's model with a scalar head and numbers of its own."""

from types import SimpleNamespace

import pytest
import tiny

from jaxtrain.config import parse_config
from jaxtrain.nn.heads import SCALAR
from jaxtrain.objectives.value import ClippedValue
from jaxtrain.rl.roles import critic_role


def declared_critic(**model):
    """The arguments with which a session is asked for the critic."""
    tree = {
        "recipe": "rl",
        "model": {"config": tiny.HF_CONFIG, **model},
        "data": {"train": {"path": "rows.jsonl"}},
        "optimizer": {"learning_rate": 1e-4, "b1": 0.5},
        "rl": {
            "algorithm": "ppo",
            "critic": {"learning_rate": 3e-3, "epsilon": 0.3},
            "rewards": [{"function": "exact_answer"}],
        },
    }
    session = SimpleNamespace(
        config=parse_config(tree, "test"), trained_role=lambda *given, **named: {"given": given} | named
    )
    return critic_role(session)


def test_the_critic_has_a_scalar_head_and_its_own_learning_rate_and_range():
    critic = declared_critic()
    assert critic["given"] == ("critic", ClippedValue(0.3))
    assert critic["model"].head == SCALAR and critic["model"].config == tiny.HF_CONFIG
    assert (critic["optimizer"].learning_rate, critic["optimizer"].b1) == (3e-3, 0.5)  # the rest is the policy's


@pytest.mark.parametrize("names", [["norm", "lm_head"], ["norm", "lm_*"]])
def test_the_scalar_head_is_in_place_of_the_head_that_adapters_would_save(names):
    lora = declared_critic(lora={"rank": 2, "modules_to_save": names})["model"].lora
    assert lora.modules_to_save == ["norm"]
