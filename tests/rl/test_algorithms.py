from dataclasses import replace

import pytest
from pydantic import ValidationError

from jaxtrain.config import ConfigError
from jaxtrain.config.rl import CriticSection, RLSection
from jaxtrain.config.rollouts import RewardSection
from jaxtrain.objectives.policy import Correction
from jaxtrain.rl.algorithms import ALGORITHMS, find_algorithm

REWARDS = [RewardSection(function="exact_answer")]


def section(**changes):
    return RLSection(rewards=REWARDS, **changes)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_sections_own_numbers_replace_the_rows(name):
    of_the_run = {"correction": Correction(), "max_completion_length": 512, "temperature": 1.0}
    row = ALGORITHMS[name]
    assert find_algorithm(section(algorithm=name)) == replace(row, objective=replace(row.objective, **of_the_run))
    changed = find_algorithm(section(algorithm=name, beta=0.0, epsilon_high=0.3))
    assert (changed.objective.beta, changed.objective.epsilon_high) == (0.0, 0.3)
    assert not changed.needs_reference
    assert changed.advantages == ALGORITHMS[name].advantages


def test_a_row_of_the_users_own_is_named_by_its_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "import jax.numpy as jnp\n"
        "from jaxtrain.objectives.policy import PolicyObjective\n"
        "from jaxtrain.rl.advantages import group_centred\n"
        "from jaxtrain.rl.algorithms import Algorithm\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Unclipped(PolicyObjective):\n"
        "    def surrogate(self, tokens):\n"
        "        return -jnp.exp(tokens.log_ratio) * tokens.advantages\n"
        "MINE = Algorithm(group_centred, Unclipped(beta=0.5))\n"
        "NOT_ONE = 3\n"
    )
    mine = find_algorithm(section(algorithm=f"{file}:MINE", beta=0.25))
    assert type(mine.objective).__name__ == "Unclipped" and mine.objective.beta == 0.25
    with pytest.raises(ConfigError, match="Unclipped does not read it"):
        find_algorithm(section(algorithm=f"{file}:MINE", dual_clip=3.0))
    with pytest.raises(ConfigError, match="no Algorithm"):
        find_algorithm(section(algorithm=f"{file}:NOT_ONE"))


def test_an_unknown_name_is_an_error_with_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean dr_grpo"):
        find_algorithm(section(algorithm="drgrpo"))


def test_a_critics_numbers_need_an_algorithm_with_one():
    critic = CriticSection(learning_rate=1e-4)
    assert find_algorithm(section(algorithm="ppo", critic=critic)).critic
    with pytest.raises(ConfigError, match="grpo has no critic"):
        find_algorithm(section(critic=critic))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 0.9}, "rl.gamma=0.9 has no effect with rl.algorithm=grpo: only gae reads it"),
        ({"lam": 0.9}, "only gae reads it"),
        ({"algorithm": "cispo", "dual_clip": 3.0}, "CISPO does not read it"),
        ({"kl": "k2"}, "rl.beta is 0"),
        ({"kl_in": "reward"}, "rl.beta is 0"),
        ({"algorithm": "rloo", "beta": 0.0, "kl": "k3"}, "rl.beta is 0"),
        ({"algorithm": "rloo", "kl_bias_correction": True}, "the KL belongs to the reward"),
        ({"algorithm": "rloo", "kl_in": "loss"}, "kl=k1 in the loss has an expected gradient of 0"),
        ({"beta": 0.1, "kl": "k1"}, "kl=k1 in the loss has an expected gradient of 0"),
        ({"beta": 0.1, "kl": "k2", "kl_bias_correction": True}, "for k1 and k3"),
        ({"entropy_target": 0.3}, "needs an entropy_coefficient"),
    ],
)
def test_numbers_without_an_effect_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        find_algorithm(section(**changes))


def test_numbers_with_an_effect_are_not():
    ppo = find_algorithm(section(algorithm="ppo", gamma=0.9, lam=0.8, dual_clip=3.0))
    assert (ppo.gamma, ppo.lam, ppo.objective.dual_clip) == (0.9, 0.8, 3.0)
    assert find_algorithm(section(beta=0.1, kl="k1", kl_bias_correction=True)).objective.kl_bias_correction
    assert find_algorithm(section(algorithm="rloo", kl_in="loss", kl="k2")).objective.kl_in == "loss"
    bonus = find_algorithm(section(entropy_coefficient=0.01, entropy_target=0.3)).objective
    assert (bonus.entropy_coefficient, bonus.entropy_target) == (0.01, 0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dual_clip": 0.5}, "dual_clip"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"sampling": {"top_k": 100, "top_p": 0.9}}, "top_k=100 is more than support=64"),
        ({"placement": {"staleness": 1}, "correction": None}, "staleness=1 needs `correction`"),
    ],
)
def test_sections_that_promise_what_does_not_happen_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        section(**changes)
