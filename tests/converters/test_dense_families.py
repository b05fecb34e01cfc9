"""Every dense family: the logits of transformers, decoded piece by piece too, and its tensors bit for bit."""

import hf_families
import hf_folders
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from converters.export_hf import export_hf
from converters.families.registry import FAMILIES
from converters.import_hf import read_config
from jaxtrain.nn.model import Model
from jaxtrain.types import Batch

LENGTH, PREFIX = 600, 450


@pytest.mark.parametrize("case", hf_families.FAMILIES)
def test_family(case, tmp_path):
    reference = hf_folders.hf_model(case)
    reference.save_pretrained(tmp_path / "in")
    params, config, hf = hf_folders.load(tmp_path / "in")
    model = Model(config)

    tokens = np.random.default_rng(0).integers(0, 101, (1, LENGTH)).astype(np.int32)
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    ones = np.ones_like(tokens)
    hidden = model.hidden(params, Batch(tokens, positions, ones, ones.astype(np.float32)))
    ours, theirs = np.asarray(model.logits(params, hidden)), logits_of(reference, tokens)
    assert np.abs(theirs).max() > 1  # a difference of 1e-4 would be none between logits of 1e-4
    assert np.abs(ours - theirs).max() < 1e-4

    cache, parts = model.empty_cache(1, LENGTH), []
    for span in (slice(0, PREFIX), slice(PREFIX, LENGTH)):
        part, cache = model.extend(params, tokens[:, span], positions[:, span], ones[:, span], cache)
        parts.append(np.asarray(part))
    np.testing.assert_allclose(np.concatenate(parts, 1), hidden, atol=1e-4)

    export_hf(params, config, hf, tmp_path / "out")
    before, after = hf_folders.tensors(tmp_path / "in"), hf_folders.tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report

    alone = FAMILIES[config.family].to_hf(config)  # without the original beside it
    assert read_config(alone)[0] == config


def logits_of(reference, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.from_numpy(tokens).long()).logits.numpy()
