"""Folders of reward models (...ForSequenceClassification in transformers) and of custom heads."""

import hf_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from converters.errors import ConversionError
from converters.export_hf import export_hf
from converters.import_hf import import_params, read_config
from jaxtrain.config import parse_config
from jaxtrain.nn.model import Model
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.declare import declare
from jaxtrain.roles.initial import adapter_params, base_params
from jaxtrain.types import Batch


def policy_of(folder, head, **model):
    section = {"path": str(folder), "head": head, "compute_dtype": "float32", **model}
    config = parse_config({"recipe": "sft", "model": section, "data": {"train": {"path": "x"}}}, "test")
    policy = declare(config.model, make_mesh(config.mesh), config.mesh.preset)
    base = base_params(config.model, policy, 0)
    return policy, base, adapter_params(config.model, policy, 0, base)


@pytest.mark.parametrize("case", ["llama", "qwen3-tied"])
def test_a_scalar_head_on_a_language_model_is_served_by_transformers(case, tmp_path):
    policy, base, head = policy_of(hf_folders.save(tmp_path / "in", case), "scalar")
    assert list(head) == ["value_head"]
    params = base | head
    out = export_hf(params, policy.model.config, policy.hf, tmp_path / "out")
    served, report = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    tokens = np.arange(3, 23)[None]
    row = Batch(tokens, np.arange(20)[None], np.ones((1, 20), np.int32), np.ones((1, 20), np.float32))
    plain = Model(policy.model.config, output="scalar")
    ours = plain.values(jax.device_get(params), plain.hidden(jax.device_get(params), row))
    with torch.no_grad():
        theirs = served.eval()(torch.from_numpy(tokens)).logits
    np.testing.assert_allclose(ours[0, -1], theirs[0, 0], atol=1e-4)

    _, base_again, head_again = policy_of(out, "scalar")  # a reward model comes back with its own head
    assert jax.tree.all(jax.tree.map(jnp.array_equal, base_again | head_again, params))


def test_a_language_model_of_a_reward_model_needs_a_head_and_labels_are_counted(tmp_path):
    policy, base, head = policy_of(hf_folders.save(tmp_path / "in", "llama-tied"), "scalar")
    out = export_hf(base | head, policy.model.config, policy.hf, tmp_path / "out")
    config, hf = read_config(out)
    with pytest.raises(ConversionError, match=r"holds tensor score\.weight"):
        import_params(out, config, hf_folders.target(config))
    _, base, head = policy_of(out, "lm")  # tied: the body is all that it takes
    assert head == {}
    back = export_hf(base, config, hf, tmp_path / "lm")
    _, report = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(report.values()), report
    hf_folders.edit_config(out, id2label={"0": "a", "1": "b"})
    with pytest.raises(ConversionError, match="classifier of 2 labels"):
        policy_of(out, "scalar")


def test_a_custom_head_is_written_beside_the_model(tmp_path):
    policy, base, head = policy_of(hf_folders.save(tmp_path / "in", "llama"), "custom_heads:low_rank")
    out = export_hf(base | head, policy.model.config, policy.hf, tmp_path / "out")
    written = load_file(out / "custom_head.safetensors")
    np.testing.assert_array_equal(written["custom_head.down"], head["custom_head"]["down"])
    assert written.keys() == {"custom_head.down", "custom_head.kernel"}
