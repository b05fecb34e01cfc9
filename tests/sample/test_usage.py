import pytest
import tiny

from jaxtrain.sample.capacity import slot_bytes
from jaxtrain.sample.usage import EngineUsage


def test_slots_are_a_mean_over_calls_and_memory_is_the_largest():
    model, params = tiny.model(), {}
    usage = EngineUsage(model, slots=8)
    assert usage.read(params) == {}
    for live, columns in ((8, 64), (4, 256), (2, 128)):
        usage.count(live, 8, columns)
    expected = {"engine/slots_in_use": 14 / 24, "engine/memory_gib": 8 * slot_bytes(model, 256) / 2**30}
    assert usage.read(params) == pytest.approx(expected)
    assert usage.read(params) == {}
