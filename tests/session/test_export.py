"""The end tokens and chat template of an export."""

import json
import shutil

import chat_templates
import hf_folders
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from jaxtrain.config import parse_config
from jaxtrain.recipes import sft
from jaxtrain.session.export import export_run

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}<|eot_id|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"  # noqa: E501


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model whose tokenizer ends texts with </s> while its chat template ends turns with <|im_end|>."""
    folder = tmp_path_factory.mktemp("export")
    tokenizer = chat_templates.tokenizer(chat_templates.CHATML)
    tokenizer.save_pretrained(folder / "base")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    hf_folders.save(folder / "base", "qwen3-tied", vocab_size=len(tokenizer) + 3, num_hidden_layers=2, **ids)
    (folder / "base" / "generation_config.json").write_text(json.dumps({**ids, "temperature": 0.5}))
    chats = [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": f"yo {i}"}]}
        for i in range(16)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "template.jinja").write_text(TEMPLATE)
    return folder


def config(place, run, learning_rate=2e-5, **model):
    tree = {
        "recipe": "sft",
        "run": {"dir": str(run)},
        "model": {"path": str(place / "base"), "compute_dtype": "float32", "remat": "none", **model},
        "data": {"train": {"path": str(place / "chats.jsonl")}, "max_length": 64},
        "train": {"steps": 2, "batch_size": 8},
        "optimizer": {"learning_rate": learning_rate, "schedule": "constant"},
        "checkpoint": {"every": 1},
        "log": {"to": []},
    }
    return parse_config(tree, "test")


def trained(place, run, **model):
    sft.run(config(place, run, **model))
    return run


def said(out):
    """The end tokens and the chat template that transformers reads."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    ends = GenerationConfig.from_pretrained(out).eos_token_id
    return tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends]), tokenizer.chat_template


def test_the_end_of_a_turn_joins_the_end_of_a_text(place, tmp_path):
    export_run(trained(place, tmp_path / "run"), tmp_path / "out")
    assert said(tmp_path / "out") == (["</s>", "<|im_end|>"], chat_templates.CHATML)
    assert hf_folders.read_json(tmp_path / "out/generation_config.json")["temperature"] == 0.5
    assert "recipe `sft`, 2 steps" in (tmp_path / "out/README.md").read_text()


def test_the_template_that_was_trained_with(place, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    run = trained(place, tmp_path / "run", chat_template=str(template))
    export_run(run, tmp_path / "out")
    assert said(tmp_path / "out") == (["</s>", "<|eot_id|>"], TEMPLATE)
    assert "chat_template" not in hf_folders.read_json(tmp_path / "out/tokenizer_config.json")
    template.write_text(TEMPLATE.replace("[", "<"))
    with pytest.raises(ValueError, match=r"tokenizer or chat template has changed since .*template\.jinja"):
        export_run(run, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_adapters_too(place, tmp_path):
    lora = {"rank": 2, "targets": ["q_proj"]}
    run = trained(place, tmp_path / "run", chat_template=str(place / "template.jinja"), lora=lora)
    export_run(run, tmp_path / "out", adapter=True)
    assert said(tmp_path / "out") == (["</s>", "<|eot_id|>"], TEMPLATE)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (
        loaded.get_input_embeddings().weight.shape[0] == hf_folders.read_json(place / "base/config.json")["vocab_size"]
    )


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_modules_to_save_are_trained_beside_adapters(quantize, place, tmp_path):
    """Nothing else changes, a resumed run is equal bit for bit, and both exports compute the same."""
    lora = {"rank": 2, "targets": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}
    options = {"learning_rate": 1e-2, "lora": lora, "quantize": quantize}
    run = trained(place, tmp_path / "run", **options)
    export_run(run, tmp_path / "out")
    before, after = hf_folders.tensors(place / "base"), hf_folders.tensors(tmp_path / "out")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    queries = {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}
    assert changed == {"model.embed_tokens.weight", "model.norm.weight", *queries}

    shutil.rmtree(run / "checkpoints" / "2")
    trained(place, run, **options)
    export_run(run, tmp_path / "again")
    for name, tensor in hf_folders.tensors(tmp_path / "again").items():
        np.testing.assert_array_equal(tensor, after[name], err_msg=name)

    export_run(run, tmp_path / "adapter", adapter=True)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        merged, adapted = (
            model.eval()(tokens).logits
            for model in (
                AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
                peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
            )
        )
    np.testing.assert_allclose(adapted, merged, atol=1e-4)
