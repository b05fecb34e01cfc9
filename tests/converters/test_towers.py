"""A language model beside other models is read as its family, and written back with the others unchanged."""

import json

import hf_folders
import hf_towers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from converters.errors import ConversionError
from converters.families.registry import FAMILIES
from converters.import_hf import read_config
from converters.towers import TOWERS, text_config, text_names
from jaxtrain.session.export import convert_checkpoint
from jaxtrain.types import get_leaf
from jaxtrain.verify import compare, load_subject
from jaxtrain.verify.subject import our_logits


@pytest.mark.parametrize("case", hf_towers.CASES)
def test_the_language_model_is_that_of_transformers_and_the_rest_is_kept(case, tmp_path):
    model = hf_towers.save(tmp_path / "in", case)
    tokens = np.random.default_rng(0).integers(0, 101, (2, 60)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(our_logits(load_subject(tmp_path / "in"), tokens, "float32"), expected, atol=1e-4)
    (tmp_path / "in" / "preprocessor_config.json").write_text("{}")
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys() and any("vision" in name or "visual" in name for name in before)
    for name, tensor in before.items():
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name
    assert hf_folders.read_json(tmp_path / "out" / "config.json") == hf_folders.read_json(tmp_path / "in/config.json")
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    _, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize("case", ["gemma3", "qwen2.5-vl"])
def test_the_verifier_compares_the_language_model(case, tmp_path):
    hf_towers.save(tmp_path, case)
    report = compare(load_subject(tmp_path), tokens=40, dtype="float32", gradients=True)
    assert report.passed, "\n".join(f"{check.name}: {check.summary}" for check in report.checks)


@pytest.mark.parametrize(
    ("prefix", "head"), [("language_model.model.", "language_model.lm_head."), ("a.b.", "lm_head.")]
)
def test_any_prefix(prefix, head, tmp_path):
    hf_towers.save(tmp_path, "qwen2.5-vl")
    stored = load_file(tmp_path / "model.safetensors")
    names = text_names(stored)
    renamed = {
        (
            head + "weight" if plain == "lm_head.weight" else prefix + plain.removeprefix("model.") if plain else name
        ): value
        for name, value in stored.items()
        for plain in [names.plain(name)]
    }
    before = get_leaf(load_subject(tmp_path).params, "lm_head", "kernel")
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(get_leaf(load_subject(tmp_path).params, "lm_head", "kernel"), before)
    convert_checkpoint(tmp_path, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == renamed.keys()


def test_two_embeddings_are_refused(tmp_path):
    hf_towers.save(tmp_path, "qwen3-vl")
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored | {"audio.embed_tokens.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ConversionError, match=r"cannot be told from the other models: one embed_tokens\.weight expected"
    ):
        hf_folders.load(tmp_path)


@pytest.mark.parametrize("name", TOWERS)
def test_missing_keys_have_the_defaults_of_transformers(name):
    theirs = getattr(transformers, f"{name.removesuffix('ForConditionalGeneration')}Config")
    head = {"architectures": [name]}
    if name.startswith("Mistral"):
        full = {"text_config": transformers.MistralConfig().to_dict()}
    else:
        full = {"text_config": theirs().to_dict()["text_config"]}
    config, _ = read_config({**head, "text_config": {}})
    assert config == read_config(json.loads(json.dumps({**head, **full})))[0]


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "text_config must be an object, not None"),
        ({"architectures": ["Qwen3VLForConditionalGeneration"], "text_config": [1]}, r"text_config must be an object"),
        (
            {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "ministral3"}},
            r"text_config\.model_type='ministral3' is not supported in Mistral3For\w+; known: mistral",
        ),
    ],
)
def test_a_section_of_another_model_is_refused(hf, message):
    with pytest.raises(ConversionError, match=message):
        read_config(hf)


def test_a_flat_config_of_qwen2_vl():
    hf = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": 2048}
    hf |= {"num_attention_heads": 16, "num_hidden_layers": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    hf |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vision_config": {"depth": 32}}
    text = text_config(hf)
    assert text["rope_scaling"] == {"type": "default"} and "vision_config" not in text
    config = FAMILIES["qwen2"].from_hf(text)
    assert (config.hidden_size, config.num_layers, config.tied) == (2048, 4, True)
    assert config.pattern[0].rope is not None and config.pattern[0].rope.theta == 1e6
