"""The section `eval`."""

import pytest

from jaxtrain.config.evaluation import EvalSection


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"generate": 2, "samples": 4}, "samples=4 at temperature=0"),
        ({"generate": 2, "greedy": True}, "greedy=true has no effect at temperature=0"),
        ({"temperature": 0.5}, "temperature has no effect without `generate`"),
    ],
)
def test_sections_that_do_not_fit_together(given, message):
    with pytest.raises(ValueError, match=message):
        EvalSection(**given)
