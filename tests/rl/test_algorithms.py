import pytest

from jaxtrain.config import ConfigError
from jaxtrain.config.rl import CriticSection, RLSection
from jaxtrain.config.rollouts import RewardSection
from jaxtrain.rl.algorithms import ALGORITHMS, find_algorithm

REWARDS = [RewardSection(function="exact_answer")]


def section(**changes):
    return RLSection(rewards=REWARDS, **changes)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_sections_own_numbers_replace_the_rows(name):
    assert find_algorithm(section(algorithm=name)) == ALGORITHMS[name]
    changed = find_algorithm(section(algorithm=name, beta=0.0, epsilon_high=0.3))
    assert (changed.beta, changed.epsilon_high) == (0.0, 0.3)
    assert not changed.needs_reference
    assert changed.advantages == ALGORITHMS[name].advantages


def test_a_row_of_the_users_own_is_named_by_its_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import jax.numpy as jnp\n"
        "from jaxtrain.rl.advantages import group_centred\n"
        "from jaxtrain.rl.algorithms import Algorithm\n"
        "def surrogate(tokens, objective):\n"
        "    return -jnp.exp(tokens.log_ratio) * tokens.advantages\n"
        "MINE = Algorithm(group_centred, surrogate, beta=0.5)\n"
        "NOT_ONE = 3\n"
    )
    mine = find_algorithm(section(algorithm=f"{file}:MINE", beta=0.25))
    assert mine.surrogate.__name__ == "surrogate" and mine.beta == 0.25
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
