from jaxtrain.config.data import DataSection
from jaxtrain.config.marks import INPUT_PATH, MAY_CHANGE, InputPath, MayChange
from jaxtrain.config.model import ModelSection
from jaxtrain.config.sections import OptimizerSection, TrainSection


def marks(section, name):
    return [mark for mark in section.model_fields[name].metadata if isinstance(mark, MayChange | InputPath)]


def test_a_mark_permits_every_value_unless_it_says_when():
    assert MAY_CHANGE.when(1, 2, None)
    longer = MayChange(lambda old, new, config: new > old)
    assert longer.when(1, 2, None) and not longer.when(2, 1, None)


def test_pydantic_keeps_the_marks_of_a_field_and_a_field_without_one_has_none():
    assert marks(TrainSection, "microbatches") == [MAY_CHANGE]
    assert marks(ModelSection, "path") == [INPUT_PATH]
    assert marks(OptimizerSection, "learning_rate") == []
    (date,) = marks(DataSection, "date")
    assert date.when("2024-01-01", None, None) and not date.when(None, "2024-01-01", None)
