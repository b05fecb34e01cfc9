"""The place of a departure: none where both are the same, the module whose weights differ where they do."""

from dataclasses import replace

import hf_folders
import jax
import numpy as np
import pytest

from converters.reference import Reference
from jaxtrain.nn.config import Rope
from jaxtrain.verify import load_subject
from jaxtrain.verify.locate import locate


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = hf_folders.save(tmp_path_factory.mktemp("locate"), "llama")
    return load_subject(folder), Reference(folder, "float32")


IDS = np.random.default_rng(0).integers(0, 101, (2, 20)).astype(np.int32)


def test_the_same_model_departs_nowhere(both):
    points, departure = locate(*both, IDS, "float32")
    assert departure is None
    assert {point.path for point in points} >= {"embed", "layers.0", "layers.1", "layers.2", "lm_head"}
    assert max(point.error for point in points) < 1e-3


def test_channels_that_the_rows_reorder_are_compared_in_our_order(tmp_path):
    """Rope on neighbouring channels: q and k agree, and a difference of what follows is found there."""
    folder = hf_folders.save(tmp_path, "glm4")
    subject, reference = load_subject(folder), Reference(folder, "float32")
    assert locate(subject, reference, IDS, "float32")[1] is None
    pattern = tuple(replace(kind, rope=Rope(90.0, partial=0.5)) for kind in subject.config.pattern)
    wrong = replace(subject, config=replace(subject.config, pattern=pattern))
    _, departure = locate(wrong, reference, IDS, "float32")
    assert departure is not None and departure.where == "layers.0.attn" and departure.suspects.startswith("rope (base")


@pytest.mark.parametrize("module", ["attn.v_proj", "mlp.down_proj"])
def test_the_first_module_with_other_weights_is_named(both, module):
    subject, reference = both
    params = jax.tree.map(np.array, subject.params)
    part, name = module.split(".")
    params["layers"][part][name]["kernel"][1] *= 1.1
    _, departure = locate(replace(subject, params=params), reference, IDS, "float32")
    assert departure is not None and departure.where == f"layers.1.{module}"
    assert departure.hf == f"model.layers.1.{'self_attn' if part == 'attn' else part}.{name}"
