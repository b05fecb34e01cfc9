"""transformers' side of a comparison, held against transformers itself."""

import json

import hf_folders
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from converters.errors import ConversionError
from converters.reference import Reference

IDS = np.random.default_rng(0).integers(0, 101, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hf_folders.save(tmp_path_factory.mktemp("reference"), "qwen3-tied")


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder, "float32")


def test_logits_are_transformers_own_and_recording_changes_none(folder, reference):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS).long()).logits.numpy()
    np.testing.assert_allclose(reference.logits(IDS), expected, atol=1e-5)
    calls, logits = reference.record(IDS, {"model.layers.1.mlp", "no.such.module"})
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert calls.keys() == {"model.layers.1.mlp"}
    assert calls["model.layers.1.mlp"].input.shape == calls["model.layers.1.mlp"].output.shape == (2, 12, 56)


def test_perturbed_frequencies_change_little_and_are_put_back(reference):
    before = reference.logits(IDS)
    perturbed = reference.logits_with_perturbed_rope(IDS)
    assert 0 < np.abs(perturbed - before).max() < 1e-3
    np.testing.assert_array_equal(reference.logits(IDS), before)


def test_gradients_have_the_names_and_shapes_of_the_file_and_are_not_added_up(folder, reference):
    first, second = reference.gradients(IDS), reference.gradients(IDS)
    stored = hf_folders.tensors(folder)
    assert {name: first[name].shape for name in stored} == {name: array.shape for name, array in stored.items()}
    for name in stored:
        np.testing.assert_array_equal(first[name], second[name])
    assert np.abs(first["model.embed_tokens.weight"]).max() > 0


def test_tied_tensors_have_one_owner(reference):
    owners = reference.owners()
    assert owners["model.layers.0.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"
    assert len({owners[name] for name in ("model.embed_tokens.weight", "lm_head.weight") if name in owners}) == 1


def test_a_folder_that_transformers_cannot_load_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ConversionError, match=f"transformers cannot load {tmp_path}"):
        Reference(tmp_path, "float32")


def test_a_quantised_folder_is_refused(tmp_path):
    folder = hf_folders.save(tmp_path, "qwen3")
    config = hf_folders.read_json(folder / "config.json") | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"is quantised, .*compare the folder that `jaxtrain convert` writes"):
        Reference(folder, "float32")
