import pytest
from pydantic import ValidationError

from jaxtrain.config.sections import MeshSection, OptimizerSection


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        (OptimizerSection, {"args": {"x": 1}}, "args are for an optimizer or schedule named by import path"),
        (MeshSection, {"fsdp": 0}, "greater than 0, or -1 for all devices"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(section, keys, message):
    with pytest.raises(ValidationError, match=message):
        section(**keys)


def test_a_share_of_warm_up_becomes_a_number_of_steps_rounded_up():
    section = OptimizerSection(warmup_ratio=0.1).for_steps(11)
    assert (section.warmup_steps, section.warmup_ratio) == (2, 0.0)
    assert OptimizerSection(warmup_steps=3).for_steps(11).warmup_steps == 3
