"""A decoder without a family file in torchax: packed equals separate, gradients equal torch's, training and export."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers

from jaxtrain.config import parse_config
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.recipes import sft
from jaxtrain.roles.declare import declare
from jaxtrain.roles.initial import base_params
from jaxtrain.session.export import export_run
from jaxtrain.train.step import score

if importlib.util.find_spec("torchax") is None:
    pytest.skip("torchax is not installed", allow_module_level=True)
SIZES = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


def save(folder, **changes):
    torch.manual_seed(0)
    config = transformers.StableLmConfig(**(SIZES | HEADS | changes))
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def tree_of(place, **model):
    rows = [{"input_ids": list(range(start, start + 9))} for start in range(40)]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "recipe": "sft",
        "run": {"dir": str(place / "run")},
        "model": {"backend": "torchax", "compute_dtype": "float32", **model},
        "data": {"train": {"path": str(place / "train.jsonl")}, "max_length": 32},
        "optimizer": {"learning_rate": 1e-2},
        "log": {"to": []},
    }


def test_packed_rows_have_torchs_losses_and_gradients(tmp_path):
    path = save(tmp_path / "base")
    config = parse_config(tree_of(tmp_path, path=path), "test")
    policy = declare(config.model, make_mesh(config.mesh), config.mesh.preset)
    params = base_params(config.model, policy, 0)
    batch = tiny.packed_batch([[9, 20], [14, 14], [30], [5, 6]] * 2, 32)

    def loss(params):
        return -jnp.sum(score(policy.model, params, batch).logp * batch.loss_weights)

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected = torch.zeros(())
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segment_ids[row].max() + 1):  # each alone, as nobody packed it
            where = np.flatnonzero(batch.segment_ids[row] == segment)
            ids = torch.from_numpy(batch.tokens[row, where]).long()
            logps = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)[:-1]
            weights = torch.from_numpy(batch.loss_weights[row, where][1:])
            expected = expected - (logps.gather(1, ids[1:, None])[:, 0] * weights).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for name, parameter in model.named_parameters():
        theirs = parameter.grad.numpy()
        np.testing.assert_allclose(grads[name], theirs, atol=1e-3 * np.abs(theirs).max(), err_msg=name)


def test_it_trains_resumes_and_is_exported(tmp_path):
    path = save(tmp_path / "base")
    tree = tree_of(tmp_path, path=path)
    first = sft.run(parse_config(tree | {"train": {"steps": 3, "batch_size": 8}}, "test"))
    longer = parse_config(tree | {"train": {"steps": 6, "batch_size": 8}}, "test")
    last = sft.run(longer, allow_change=["train.steps"])
    assert last.metrics["loss"] < first.metrics["loss"]
    export_run(Path(tree["run"]["dir"]), tmp_path / "out")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    before = transformers.AutoModelForCausalLM.from_pretrained(path)
    ids = torch.arange(20, 29)[None]
    with torch.no_grad():
        assert model(ids, labels=ids).loss < before(ids, labels=ids).loss


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"lora": {"rank": 2}}, r"model\.lora is not available"), ({"head": "scalar"}, r"model\.head is not available")],
)
def test_unsupported_keys_are_refused(keys, message, tmp_path):
    tree = tree_of(tmp_path, path="nowhere", **keys)
    config = parse_config(tree, "test")
    with pytest.raises(ValueError, match=message):
        declare(config.model, make_mesh(config.mesh), config.mesh.preset)
