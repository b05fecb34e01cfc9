"""Models for tests of the verifier."""

import functools

import planted
import pytest


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """`loaded(model)`: the result of `planted.load`, made once for each of `planted.MODELS`."""
    return functools.cache(lambda model: planted.load(tmp_path_factory.mktemp(model), model))
