import pytest
from pydantic import ValidationError

from jaxtrain.config.rl import CriticSection, RLSection

REWARDS = [{"function": "exact_answer"}]


def section(**keys):
    return RLSection.model_validate({"rewards": REWARDS, **keys})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rewards": []}, "samples have no reward"),
        ({"rewards": REWARDS * 2}, "two rewards are named 'exact_answer'"),
        ({"reward_models": [{"path": "a", "name": "exact_answer"}]}, "two rewards are named 'exact_answer'"),
        ({"prompts": 6, "minibatches": 4}, "prompts=6 is not a multiple of minibatches=4"),
        ({"critic": {"epsilon": 0.5}}, "critic: algorithm grpo has none"),
        ({"algorithm": "grop"}, "grop"),
        ({"algorithm": "gkd"}, "algorithm gkd reads no rewards"),
        (
            {"rewards": [], "algorithm": {"name": "dapo", "teacher_coefficient": 1.0}},
            "max_refills=3: dynamic sampling replaces groups whose rewards are all equal, and there are no rewards",
        ),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        section(**keys)


def test_only_an_algorithm_with_a_critic_has_its_keys():
    assert section(algorithm="ppo", critic={"epsilon": 0.5}).critic == CriticSection(epsilon=0.5)
    assert section(algorithm="ppo").algorithm.critic


def test_a_teacher_needs_no_rewards_beside_it():
    assert not section(rewards=[], algorithm="on_policy_distillation").rewarded
    assert section(algorithm="on_policy_distillation").rewarded
    assert section(rewards=[], algorithm="gkd", environment={"factory": "my_game.py:Game"}).rewarded


def test_updates_are_the_minibatches_of_all_passes():
    assert section(prompts=8, iterations=3, minibatches=4).updates == 12
