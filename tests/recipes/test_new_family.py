"""Drafts a family for an unsupported architecture; the verifier passes it."""

import importlib
import sys

import hf_folders
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from converters.errors import ConversionError
from converters.families import qwen2
from converters.families.registry import FAMILIES, register
from jaxtrain.recipes.new_family import write_draft
from jaxtrain.verify import compare, load_subject


class FooConfig(Qwen2Config):
    model_type = "foo"


class FooForCausalLM(Qwen2ForCausalLM):
    config_class = FooConfig


AutoConfig.register("foo", FooConfig)
AutoModelForCausalLM.register(FooConfig, FooForCausalLM)


@pytest.fixture
def folder(tmp_path):
    """Qwen2 under another name."""
    torch.manual_seed(0)
    FooForCausalLM(FooConfig(**hf_folders.SIZES)).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def draft(folder, name="foo"):
    return write_draft(name, folder, folder.parent / f"{name}.py")


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """Registers the family in a file `foo.py` during a test."""
    monkeypatch.syspath_prepend(tmp_path)

    def by_name():
        register(importlib.import_module("foo"))
        return FAMILIES["foo"]

    yield by_name
    FAMILIES.pop("foo", None)
    sys.modules.pop("foo", None)


def test_a_draft_passes_the_verifier(folder, registered):
    with pytest.raises(ConversionError, match="architecture FooForCausalLM is not supported"):
        load_subject(folder)
    assert draft(folder).template == "qwen2"
    assert registered().WEIGHTS == qwen2.WEIGHTS
    report = compare(load_subject(folder), tokens=80, gradients=True, dtype="float32")
    assert report.passed, report.checks


def test_unmatched_rows_and_keys_are_listed(folder, registered):
    stored = hf_folders.tensors(folder)
    stored["model.layers.0.mlp.surprise"] = np.zeros((3, 5), np.float32)
    save_file(stored, folder / "model.safetensors")
    hf_folders.edit_config(folder, surprising_factor=0.5)
    found = draft(folder).problems
    text = (folder.parent / "foo.py").read_text()
    for words in ("tensor model.layers.{layer}.mlp.surprise [3, 5]: no row", "key surprising_factor=0.5 may change"):
        assert any(problem.startswith(words) for problem in found), found
        assert words in text
    family = registered()
    with pytest.raises(ConversionError, match=r"holds tensor model\.layers\.0\.mlp\.surprise"):
        load_subject(folder)
    with pytest.raises(ConversionError, match=r"surprising_factor=0\.25 is not supported"):
        family.from_hf({"surprising_factor": 0.25})


def test_rows_are_guessed_from_names_and_shapes(folder, registered):
    other = {"self_attn": "attention", "q_proj": "query", "input_layernorm": "ln_1", "embed_tokens": "tokens"}
    stored = hf_folders.tensors(folder)
    for old, new in other.items():
        stored = {name.replace(old, new): tensor for name, tensor in stored.items()}
    save_file(stored, folder / "model.safetensors")
    found = draft(folder).problems
    assert all("is a guess" in problem for problem in found[1:]), found
    guessed = {row.ours: row.hf for row in registered().WEIGHTS}
    assert guessed["layers.attn.q_proj.kernel"] == "model.layers.{layer}.attention.query.weight"
    assert guessed["layers.attn.k_proj.kernel"] == "model.layers.{layer}.attention.k_proj.weight"
    assert guessed["layers.input_norm.scale"] == "model.layers.{layer}.ln_1.weight"
    assert guessed["embed.weight"] == "model.tokens.weight"
    load_subject(folder)


def test_refused_drafts(folder, tmp_path):
    known = hf_folders.save(tmp_path / "known", "qwen3")
    with pytest.raises(ConversionError, match=r"Qwen3ForCausalLM \(model_type qwen3\) is already read by family qwen3"):
        draft(known)
    with pytest.raises(ValueError, match="'a-b' is not a valid family name"):
        draft(folder, "a-b")
    with pytest.raises(ValueError, match=r"qwen3.* is already registered"):
        register(FAMILIES["qwen3"])
    draft(folder)
    with pytest.raises(ValueError, match=r"foo\.py already exists"):
        draft(folder)
