"""A draft from names and shapes alone; tests/recipes/test_new_family.py holds drafts against transformers."""

import hf_folders
import pytest

from converters.errors import ConversionError
from converters.families import llama
from converters.new_family import draft_family
from converters.weight_rows import bind, flatten
from jaxtrain.nn.model import Model

HF = {"architectures": ["FooForCausalLM"], "model_type": "foo", **hf_folders.SIZES, "tie_word_embeddings": False}


def shapes_of(config):
    return {ours: leaf.shape for ours, leaf in flatten(Model(config).abstract()).items()}


def stored():
    config = llama.from_hf(HF)
    return {tensor.name: tensor.shape for tensor in bind(llama.WEIGHTS, shapes_of(config), config)}


def test_the_nearest_family_is_the_template_and_what_is_unresolved_is_listed():
    draft = draft_family("foo", HF | {"strange_factor": 0.5}, stored(), shapes_of)
    assert draft.template == "llama"
    compile(draft.text, "foo.py", "exec")
    names = {}
    exec(draft.text, names)
    assert (names["ARCHITECTURE"], names["MODEL_TYPE"]) == ("FooForCausalLM", "foo")
    assert names["INERT"]["strange_factor"] == (0.5,) and names["WEIGHTS"] == llama.WEIGHTS
    assert any("strange_factor=0.5 may change what is computed" in problem for problem in draft.problems)
    assert all(problem in draft.text for problem in draft.problems)


def test_a_tensor_without_a_row_is_a_problem():
    draft = draft_family("foo", HF, stored() | {"model.layers.0.extra": (3, 5)}, shapes_of)
    assert "tensor model.layers.{layer}.extra [3, 5]: no row" in draft.problems


def test_a_known_architecture_and_one_without_a_name_are_refused():
    with pytest.raises(ConversionError, match=r"LlamaForCausalLM \(model_type foo\) is already read by family llama"):
        draft_family("foo", HF | {"architectures": ["LlamaForCausalLM"]}, {}, shapes_of)
    with pytest.raises(ConversionError, match="lacks architectures or model_type"):
        draft_family("foo", {}, {}, shapes_of)
