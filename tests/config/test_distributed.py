import pytest

from jaxtrain.config import ConfigError, parse_config
from jaxtrain.config.changes import differences

TREE = {"recipe": "sft", "model": {"path": "a"}, "data": {"train": {"path": "b"}}}


def test_timeouts_may_change_on_resume():
    old = parse_config(TREE)
    new = parse_config(TREE | {"distributed": {"step_timeout": 60, "port": 1234, "unreachable_timeout": 30}})
    assert old.distributed != new.distributed and not differences(old, new)


@pytest.mark.parametrize("key", ["port", "unreachable_timeout", "step_timeout", "initialization_timeout"])
def test_a_negative_number_is_refused_with_its_key(key):
    with pytest.raises(ConfigError, match=f"distributed.{key}"):
        parse_config(TREE | {"distributed": {key: -1}})
