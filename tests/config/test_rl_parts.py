import pytest
from pydantic import ValidationError

from jaxtrain.config.rl_parts import EnvironmentSection, PlacementSection, RewardSection


def length(text):
    return float(len(text))


@pytest.mark.parametrize(
    ("function", "name"),
    [("exact_answer", "exact_answer"), ("my.module:digits", "digits"), ("folder/file.py:Of.digits", "digits")],
)
def test_a_reward_is_called_by_the_last_part_of_its_path(function, name):
    assert RewardSection(function=function).name == name
    assert RewardSection(function=length).name == "length"


def test_a_conversation_is_no_longer_than_its_row():
    section = {"factory": "NumberReversal"}
    assert EnvironmentSection(**section).max_length(100) == 100
    assert EnvironmentSection(**section, max_tokens=60).max_length(100) == 60
    assert EnvironmentSection(**section, max_tokens=600).max_length(100) == 100


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "disjoint"}, "kind=disjoint with rollout_devices=None"),
        ({"rollout_devices": 2}, "kind=colocated with rollout_devices=2"),
        ({"workers": 2}, "workers=2 belongs to kind=ray"),
        ({"resources": {"GPU": 1.0}}, r"resources=\{'GPU': 1.0\} belongs to kind=ray"),
    ],
)
def test_keys_of_another_kind_of_placement_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        PlacementSection(**keys)
    PlacementSection(kind="ray", workers=2, resources={"GPU": 1.0})
    PlacementSection(kind="disjoint", rollout_devices=2)


@pytest.mark.parametrize("changes", [{"kind": "disjoint", "rollout_devices": 1}, {"staleness": 1}], ids=str)
def test_phases_need_sampling_and_updates_in_turn_on_the_same_devices(changes):
    assert PlacementSection(memory="phased").memory == "phased"
    with pytest.raises(ValidationError, match="memory=phased needs kind=colocated and staleness=0"):
        PlacementSection(memory="phased", **changes)
