"""New tokens, and training without a tokenizer: trained, exported, and loaded by transformers."""

import json
from pathlib import Path

import hf_folders
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from converters.export_hf import TOKENIZER_FILES
from converters.tokenizer import write_byte_tokenizer
from jaxtrain.config import load_config, parse_config
from jaxtrain.nn.model import Model
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.recipes import sft
from jaxtrain.roles.declare import declare
from jaxtrain.session.export import export_run
from jaxtrain.types import Batch

EVENTS = Path(__file__).parents[2] / "configs" / "sft" / "events.yaml"
SMALL = {"compute_dtype": "float32", "remat": "none"}


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def tree_of(place, name, model, rows):
    return {
        "recipe": "sft",
        "run": {"dir": str(place / name)},
        "model": SMALL | model,
        "data": {"train": {"path": write_rows(place / f"{name}.jsonl", rows)}, "max_length": 32},
        "train": {"steps": 2, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
        "log": {"to": []},
    }


def train_and_export(tree, out):
    assert sft.run(parse_config(tree, "test")).exit_code == 0
    export_run(Path(tree["run"]["dir"]), out)
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    return model


def assert_same_logits(out, model, ids):
    """Compares the logits of the export in our model and in transformers."""
    params, config, _ = hf_folders.load(out)
    ones = np.ones((1, len(ids)), np.int32)
    row = Batch(np.array([ids]), np.arange(len(ids))[None], ones, ones)
    ours = Model(config).logits(params, Model(config).hidden(params, row))
    with torch.no_grad():
        np.testing.assert_allclose(ours, model.eval()(torch.tensor([ids])).logits, atol=1e-4)


ADDED = {"names": ["<think>"], "prefix": "<sid_", "count": 20}
MODES = {
    "all, untied": ("llama", {"add_tokens": ADDED}),
    "alone, tied": ("qwen3-tied", {"add_tokens": ADDED | {"alone": True, "special": True}}),
    "alone, untied, quantised": ("llama", {"add_tokens": ADDED | {"alone": True}, "quantize": "int8"}),
    "all beside adapters, untied": (
        "llama",
        {"add_tokens": ADDED, "lora": {"rank": 2, "modules_to_save": ["embed_tokens", "lm_head"]}},
    ),
    "adapters, tied": ("qwen3-tied", {"add_tokens": ADDED, "lora": {"rank": 2}}),
}


@pytest.mark.parametrize("mode", MODES)
def test_new_tokens_start_at_the_mean_and_frozen_rows_do_not_change(mode, tmp_path):
    case, keys = MODES[mode]
    # Three rows more than the tokenizer has tokens.
    folder = hf_folders.save(tmp_path / "base", case, vocab_size=262, num_hidden_layers=1)
    write_byte_tokenizer(folder)
    rows = [
        {"prompt": f"item {i}?", "completion": f"<think>it is</think><sid_{i % 20}><sid_{(7 * i) % 20}>"}
        for i in range(40)
    ]
    tree = tree_of(tmp_path, "run", {"path": str(folder), **keys}, rows)

    model = train_and_export(tree, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("a<sid_19>b<think>", add_special_tokens=False)["input_ids"]
    assert ids[1::2] == [259 + 20, 259] and len(tokenizer) == 280
    special = keys["add_tokens"].get("special", False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == ("ab" if special else "a<sid_19>b<think>")
    assert model.config.vocab_size == 280
    assert_same_logits(tmp_path / "out", model, ids)

    before, after = hf_folders.tensors(folder), hf_folders.tensors(tmp_path / "out")
    for name in ("model.embed_tokens.weight", *(["lm_head.weight"] if case == "llama" else [])):
        old, new = before[name], after[name]
        start = old[:259].mean(0)
        assert 1e-4 < np.abs(new[259:] - start).max() < 0.1, name  # two steps from the mean
        assert (np.abs(new[:259] - old[:259]).max() == 0) == (not mode.startswith("all")), name
    if "alone" in mode:  # nothing else has moved
        others = before.keys() - {"model.embed_tokens.weight", "lm_head.weight"}
        assert all(np.array_equal(before[name], after[name]) for name in others)


def test_one_of_two_tables_cannot_be_trained_in_full_beside_new_tokens(tmp_path):
    folder = hf_folders.save(tmp_path / "base", "llama", vocab_size=259)
    write_byte_tokenizer(folder)
    model = {"path": str(folder), "add_tokens": ADDED, "lora": {"modules_to_save": ["embed_tokens"]}}
    config = parse_config(tree_of(tmp_path, "run", model, [{"text": "hello"}]), "test")
    with pytest.raises(ValueError, match="new tokens need rows in both tables: name lm_head too"):
        declare(config.model, make_mesh(config.mesh), config.mesh.preset)


def test_tokens_that_cannot_be_added_are_named(tmp_path):
    folder = hf_folders.save(tmp_path / "base", vocab_size=259)
    write_byte_tokenizer(folder)
    known = {"path": str(folder), "add_tokens": {"names": ["<|im_start|>"], "alone": True}}
    config = parse_config(tree_of(tmp_path, "run", known, [{"input_ids": [1, 2]}]), "test")
    with pytest.raises(ValueError, match="already has all of these tokens"):
        declare(config.model, make_mesh(config.mesh), config.mesh.preset)


def test_events_without_a_tokenizer_are_trained_from_scratch_and_tuned_on_a_quantised_base(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"input_ids": (int(rng.integers(20)) + np.arange(rng.integers(4, 14))).tolist()} for _ in range(60)]
    files = [f"data.{part}.path={write_rows(tmp_path / f'{part}.jsonl', rows)}" for part in ("train", "eval")]
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    small = [f"model.config.{key}={value}" for key, value in sizes.items()]
    steps = ["train.steps=12", "optimizer.warmup_steps=2", "optimizer.learning_rate=1e-2", "log.every=1"]
    run = [f"run.dir={tmp_path / 'events'}", "data.max_length=32", "train.batch_size=8", "log.to=[]"]
    outcome = sft.run(load_config(EVENTS, [*files, *small, *steps, *run]))
    losses = [json.loads(line) for line in (tmp_path / "events" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < losses[0] - 0.5 and outcome.metrics["eval_loss"] < losses[0]
    base = tmp_path / "base"
    export_run(tmp_path / "events", base, dtype="float32")
    assert not any((base / name).exists() for name in TOKENIZER_FILES)
    assert_same_logits(base, AutoModelForCausalLM.from_pretrained(base), [3, 4, 5, 6])

    # The export goes on as a base without a tokenizer; what comes out is merged into its weights, not into rounded.
    tuned = tree_of(tmp_path, "tuned", {"path": str(base), "quantize": "nf4", "lora": {"rank": 2, "alpha": 3.0}}, rows)
    train_and_export(tuned, tmp_path / "merged")
    export_run(tmp_path / "tuned", tmp_path / "adapter", adapter=True)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before, after = hf_folders.tensors(base), hf_folders.tensors(tmp_path / "merged")
    module = "model.layers.1.self_attn.o_proj"
    a, b = (factors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
    assert np.abs(b).max() > 0
    np.testing.assert_allclose(after[f"{module}.weight"], before[f"{module}.weight"] + 1.5 * b @ a, atol=1e-6)

    text = tree_of(tmp_path, "text", {"path": str(base)}, [{"text": "hello"}])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        sft.run(parse_config(text, "test"))
