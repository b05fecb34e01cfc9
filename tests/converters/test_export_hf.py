"""An unchanged model is exported bit for bit; a changed one loads in transformers; a failed export leaves nothing."""

import json

import hf_folders
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from converters import export_hf as export_module
from converters.errors import ConversionError
from converters.export_hf import TrainedText, convert, export_hf
from converters.import_hf import read_config
from converters.tokenizer import load_tokenizer, write_byte_tokenizer

TOKENIZER = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "generation_config.json": '{"eos_token_id": [2, 7], "temperature": 0.6, "do_sample": true}',
}


def round_trip(folder, out, dtype=jnp.float32, preset=None, **kwargs):
    params, config, hf = hf_folders.load(folder, dtype, preset)
    return export_hf(params, config, hf, out, **kwargs)


def run_convert(folder, out, **kwargs):
    config, hf = read_config(folder)
    return convert(folder, config, hf, hf_folders.target(config), out, **kwargs)


def assert_same_tensors(ours, theirs):
    ours, theirs = hf_folders.tensors(ours), hf_folders.tensors(theirs)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype, name
        assert ours[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("case", hf_folders.CASES)
def test_an_unchanged_model_is_exported_bit_for_bit(case, tmp_path):
    folder = hf_folders.save(tmp_path / "in", case)
    out = round_trip(folder, tmp_path / "out")
    assert_same_tensors(out, folder)
    assert hf_folders.read_json(out / "config.json") == hf_folders.read_json(folder / "config.json")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("preset", ["fsdp", "fsdp_tensor"])
def test_sharded_and_in_half_precision_too(dtype, preset, tmp_path):
    folder = hf_folders.save(tmp_path / "in", dtype=getattr(torch, dtype))
    out = round_trip(folder, tmp_path / "out", jnp.dtype(dtype), preset, max_shard_bytes=40_000)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    assert_same_tensors(out, folder)
    assert hf_folders.read_json(out / "config.json") == hf_folders.read_json(folder / "config.json")


def test_float32_masters_of_a_bfloat16_checkpoint_come_back(tmp_path):
    folder = hf_folders.save(tmp_path / "in", dtype=torch.bfloat16)
    assert_same_tensors(round_trip(folder, tmp_path / "out", dtype="bfloat16"), folder)


@pytest.mark.parametrize("case", hf_folders.CASES)
def test_transformers_loads_it_and_computes_the_same(case, tmp_path):
    original = hf_folders.hf_model(case)
    original.save_pretrained(tmp_path / "in")
    out = round_trip(tmp_path / "in", tmp_path / "out", preset="fsdp", max_shard_bytes=60_000)
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens).logits, original(tokens).logits, rtol=0, atol=0)


def test_trained_parameters_reach_transformers(tmp_path):
    """transformers computes with changed parameters, with another vocabulary, dtype and shard size."""
    params, config, hf = hf_folders.load(hf_folders.save(tmp_path / "in", dtype=torch.float32))
    params["layers"]["attn"]["q_proj"]["kernel"] *= 1.5
    export_hf(params, config, hf, tmp_path / "out", dtype="bfloat16")
    before, after = hf_folders.tensors(tmp_path / "in"), hf_folders.tensors(tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(after[name], (before[name] * np.float32(1.5)).astype(ml_dtypes.bfloat16))
    assert hf_folders.read_json(tmp_path / "out/config.json")["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_old_key_torch_dtype_is_kept(tmp_path):
    folder = hf_folders.edit_config(hf_folders.save(tmp_path / "in"), "dtype", torch_dtype="float32")
    hf = hf_folders.read_json(round_trip(folder, tmp_path / "out", dtype="bfloat16") / "config.json")
    assert hf["torch_dtype"] == "bfloat16"
    assert "dtype" not in hf


def test_unknown_keys_of_config_json_survive(tmp_path):
    folder = hf_folders.edit_config(hf_folders.save(tmp_path / "in"), my_note="kept", _name_or_path="x")
    out = round_trip(folder, tmp_path / "out")
    assert hf_folders.read_json(out / "config.json") == hf_folders.read_json(folder / "config.json")


def test_padding_of_the_vocabulary_is_removed(tmp_path):
    params, config, hf = hf_folders.load(hf_folders.save(tmp_path / "in"))
    params["embed"]["weight"] = params["embed"]["weight"].at[101:].set(7)  # even if it were not zero
    out = export_hf(params, config, hf, tmp_path / "out")
    assert hf_folders.tensors(out)["model.embed_tokens.weight"].shape == (101, 56)
    assert_same_tensors(out, tmp_path / "in")


def test_tokenizer_template_and_generation_config_are_copied(tmp_path):
    folder = hf_folders.save(tmp_path / "in")
    (folder / "additional_chat_templates").mkdir()
    for name, text in TOKENIZER.items():
        (folder / name).write_text(text)
    (folder / "training_args.bin").write_text("not ours to spread")
    for out in (round_trip(folder, tmp_path / "a", tokenizer_from=folder), run_convert(folder, tmp_path / "b")):
        assert {name: (out / name).read_text() for name in TOKENIZER} == TOKENIZER
        assert not (out / "training_args.bin").exists()


def test_generation_config_is_made_where_there_is_none(tmp_path):
    folder = hf_folders.save(tmp_path / "in")
    (folder / "generation_config.json").unlink()
    out = round_trip(folder, tmp_path / "out", tokenizer_from=folder)
    assert hf_folders.read_json(out / "generation_config.json") == {"bos_token_id": 1, "eos_token_id": 2}
    assert GenerationConfig.from_pretrained(out).eos_token_id == 2


@pytest.mark.parametrize("stored", [False, True])
def test_convert_keeps_dtypes_and_a_tied_head(stored, tmp_path):
    folder = hf_folders.save(tmp_path / "in", "qwen3-tied")
    tensors = hf_folders.tensors(folder)
    for name in tensors:
        tensors[name] = tensors[name].astype(np.float32 if "norm" in name else ml_dtypes.bfloat16)
    if stored:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = run_convert(folder, tmp_path / "out", max_shard_bytes=30_000)
    assert_same_tensors(out, folder)
    assert (out / "model.safetensors.index.json").exists()
    assert hf_folders.read_json(out / "config.json") == hf_folders.read_json(folder / "config.json")
    _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report


def test_convert_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    import tracemalloc

    folder = hf_folders.save(tmp_path / "in", num_hidden_layers=20, hidden_size=128, intermediate_size=512)
    config, hf = read_config(folder)
    target = hf_folders.target(config)
    sizes = [array.nbytes for array in hf_folders.tensors(folder).values()]
    tracemalloc.start()
    convert(folder, config, hf, target, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(sizes) > 15e6
    assert peak < 8 * max(sizes) < sum(sizes) / 4


@pytest.mark.parametrize("run", [round_trip, run_convert])
def test_existing_files_are_never_overwritten(run, tmp_path):
    folder = hf_folders.save(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    assert run(folder, out) == out  # an empty folder may be filled
    with pytest.raises(ConversionError, match="out already exists and is not an empty folder"):
        run(folder, out)
    with pytest.raises(ConversionError, match=r"config\.json already exists"):
        run(folder, out / "config.json")


@pytest.mark.parametrize("run", [round_trip, run_convert])
def test_a_full_disk_leaves_nothing_behind(run, tmp_path, monkeypatch):
    folder = hf_folders.save(tmp_path / "in")

    def fail(partial, *args):
        (partial / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_checkpoint", fail)
    with pytest.raises(OSError, match="No space left"):
        run(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_random_parameters_export_with_a_custom_config(tmp_path):
    """As in the quickstart: without a checkpoint, only with the content of a config.json."""
    hf = {"model_type": "qwen3", **hf_folders.SIZES, "tie_word_embeddings": True}
    config, _ = read_config(hf)
    params = hf_folders.Model(config).init(jax.random.key(0))
    out = export_hf(params, config, hf, tmp_path / "deep" / "out")
    written = json.loads((out / "config.json").read_text())
    assert written == {**hf, "architectures": ["Qwen3ForCausalLM"], "dtype": "float32"}
    _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report


def test_a_model_trained_from_scratch_ends_texts_with_the_tokenizers_token(tmp_path):
    write_byte_tokenizer(tmp_path / "tokenizer")
    sizes = {key: value for key, value in hf_folders.SIZES.items() if not key.endswith("_token_id")}
    hf = {"model_type": "qwen3", **sizes, "tie_word_embeddings": True}
    config, _ = read_config(hf)
    params = hf_folders.Model(config).init(jax.random.key(0))
    out = export_hf(params, config, hf, tmp_path / "out", tokenizer_from=tmp_path / "tokenizer")
    eos = load_tokenizer(out).eos_token_id
    assert eos is not None
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == eos


def test_the_tokenizer_names_the_end_where_config_json_names_other_special_tokens_only(tmp_path):
    write_byte_tokenizer(tmp_path / "tokenizer")
    sizes = {key: value for key, value in hf_folders.SIZES.items() if not key.endswith("_token_id")}
    hf = {"model_type": "qwen3", **sizes, "tie_word_embeddings": True, "bos_token_id": 5}
    config, _ = read_config(hf)
    params = hf_folders.Model(config).init(jax.random.key(0))
    out = export_hf(params, config, hf, tmp_path / "out", tokenizer_from=tmp_path / "tokenizer")
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.bos_token_id, generation.eos_token_id) == (5, load_tokenizer(out).eos_token_id)


@pytest.mark.parametrize(
    ("stored", "expected"), [(None, [7, 9]), (9, [9, 7]), ([3, 7], [3, 7, 9]), ([9, 7], [9, 7])], ids=str
)
def test_ends_join_those_that_are_there(stored, expected, tmp_path):
    folder = hf_folders.save(tmp_path / "in")
    content = {"temperature": 0.5} | ({} if stored is None else {"eos_token_id": stored})
    (folder / "generation_config.json").write_text(json.dumps(content))
    out = round_trip(folder, tmp_path / "out", tokenizer_from=folder, text=TrainedText(end_ids=[7, 9, 7]))
    assert hf_folders.read_json(out / "generation_config.json") == {"temperature": 0.5, "eos_token_id": expected}


def test_a_template_replaces_the_stored_one_wherever_it_is(tmp_path):
    folder = hf_folders.save(tmp_path / "in")
    named = [{"name": "default", "template": "old"}, {"name": "rag", "template": "of documents"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, "eos_token": "x"}))
    (folder / "chat_template.json").write_text('{"chat_template": "older"}')
    out = round_trip(folder, tmp_path / "out", tokenizer_from=folder, text=TrainedText(chat_template="new"))
    assert (out / "chat_template.jinja").read_text() == "new"
    assert (out / "additional_chat_templates/rag.jinja").read_text() == "of documents"
    assert hf_folders.read_json(out / "tokenizer_config.json") == {"eos_token": "x"}
    assert not (out / "chat_template.json").exists()
