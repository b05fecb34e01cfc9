"""The verifier passes correct models and locates errors."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import hf_folders
import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from converters.families import qwen3
from converters.families.registry import FAMILIES
from converters.reference import Reference
from converters.weight_rows import Split
from jaxtrain.cli import app
from jaxtrain.nn.config import Rope
from jaxtrain.verify import compare, load_subject
from jaxtrain.verify.checks import LOGIT_TOLERANCE, decode_check, exact_tolerance
from jaxtrain.verify.locate import locate
from jaxtrain.verify.subject import our_logits, token_rows

WINDOW, LAYER = 37, 1
TOKENS = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with several error-prone features: scaled rope, a window on the middle layer, a square o_proj."""
    windows = ["full_attention", "sliding_attention", "full_attention"]
    return hf_folders.save(
        tmp_path_factory.mktemp("qwen3"),
        "qwen3",
        hidden_size=64,
        pad_token_id=7,
        rope_parameters={**hf_folders.LLAMA3, "original_max_position_embeddings": 16},
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=windows,
    )


@pytest.fixture(scope="module")
def subject(folder):
    return load_subject(folder)


@pytest.fixture(scope="module")
def locate_mismatch(folder):
    """The first mismatch between a subject and transformers' model of the folder."""
    reference = Reference(folder, "float32")

    def first(subject):
        ids = np.stack(list(token_rows(subject, TOKENS).values()))
        return locate(subject, reference, ids, "float32")[1]

    return first


def with_rows(monkeypatch, folder, change):
    """The folder, imported with the family's rows after `change`."""
    rows = tuple(map(change, qwen3.WEIGHTS))
    monkeypatch.setitem(FAMILIES, "qwen3", SimpleNamespace(**{**vars(qwen3), "WEIGHTS": rows}))
    return load_subject(folder)


def with_params(subject, change):
    params = jax.tree.map(lambda leaf: leaf, subject.params)
    change(params)
    return dataclasses.replace(subject, params=params)


def with_config(subject, **changes):
    return dataclasses.replace(subject, config=dataclasses.replace(subject.config, **changes))


IN_FLOAT64 = ("qwen3-moe-some-dense", "mixtral-window", "gpt-oss")


# `test_parity` and `test_mixtures` compare logits of all cases.
@pytest.mark.parametrize("case", [case for case in hf_folders.ONE_OF_EACH if case not in IN_FLOAT64])
def test_families_pass(case, tmp_path):
    subject = load_subject(hf_folders.save(tmp_path, case))
    report = compare(subject, tokens=TOKENS, dtype="float32", gradients=True, decode=True)
    assert report.passed, "\n".join(f"{check.name}: {check.summary}" for check in report.checks)


def passes(folder, **options):
    report = compare(load_subject(folder), tokens=TOKENS, dtype="float32", decode=True, **options)
    assert report.passed, "\n".join(f"{check.name}: {check.summary}" for check in report.checks)
    return {check.name: check for check in report.checks}


def rescaled(folder, name, factor):
    tensors = hf_folders.tensors(folder)
    save_file(
        {key: value * np.float32(factor if key == name else 1) for key, value in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.mark.parametrize("case", IN_FLOAT64)
def test_experts_in_float64(case, tmp_path):
    """The checks of `test_families_pass` too.

    If float32 exceeds the tolerance, the reference runs in float64, where torch has no grouped matrix product."""
    checks = passes(rescaled(hf_folders.save(tmp_path, case), "lm_head.weight", 3000), gradients=True)
    assert "logits float64, random ids" in checks


def test_a_reward_model(tmp_path):
    """The scores of all tokens are compared; a wrong head is located."""
    torch.manual_seed(0)
    config = hf_folders.hf_config("qwen3", num_labels=1, num_hidden_layers=2)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    subject = load_subject(tmp_path)
    report = compare(subject, tokens=40, gradients=True, decode=True)
    assert report.passed, "\n".join(f"{check.name}: {check.summary}" for check in report.checks)
    assert "scores bfloat16, random ids" in {check.name for check in report.checks}
    wrong = with_params(subject, lambda p: p.update(value_head={"kernel": 1.1 * p["value_head"]["kernel"]}))
    ids = np.stack(list(token_rows(subject, 40).values()))
    assert locate(wrong, Reference(tmp_path, "float32"), ids, "float32")[1].where == "value_head"


def test_a_rope_that_changes_within_the_tokens(tmp_path):
    hf_folders.save(tmp_path, "phi3-longrope-tied", original_max_position_embeddings=16, num_hidden_layers=2)
    report = compare(load_subject(tmp_path), tokens=40, dtype="float32")
    assert report.passed, "\n".join(f"{check.name}: {check.summary}" for check in report.checks)
    names = {check.name for check in report.checks}
    assert {f"logits float32, {length} tokens, where rope changes" for length in (16, 17)} < names
    packed = next(check for check in report.checks if check.name == "packed rows")
    assert packed.summary.startswith("documents of 16, 17, 7 tokens")


def test_experts_with_an_unaligned_width(tmp_path):
    passes(hf_folders.save(tmp_path, "qwen3-moe", moe_intermediate_size=34), gradients=True)


@pytest.mark.parametrize("factor", [1, 30, 1000])
def test_the_tolerance_in_float64_grows_with_the_logits(factor, tmp_path):
    """Norms, rope and softmax are float32 even in float64 models, and a cache changes their order."""
    checks = passes(rescaled(hf_folders.save(tmp_path, "qwen3-tied"), "model.norm.weight", factor))
    assert ("logits float64, random ids" in checks) == (factor > 1)


def test_logits_up_to_10_keep_the_absolute_tolerance():
    assert exact_tolerance(np.array([0.01, -9.9])) == LOGIT_TOLERANCE == 1e-4
    assert exact_tolerance(np.array([3.0, -43.0])) == pytest.approx(4.3e-4)


def test_a_wrong_cache_fails_at_any_scale(tmp_path):
    """Logits in the thousands, and an error of 0.1 % in the decoded ones."""
    subject = load_subject(rescaled(hf_folders.save(tmp_path, "qwen3-tied"), "model.norm.weight", 1000))
    ids = np.stack(list(token_rows(subject, 40).values()))
    ours = our_logits(subject, ids, "float64")
    assert decode_check(subject, ids, "float64", ours, ours, exact_tolerance(ours)).passed
    assert not decode_check(subject, ids, "float64", ours * 1.001, ours, exact_tolerance(ours)).passed


def test_a_tied_table_that_is_stored_as_the_head_only(tmp_path):
    hf_folders.save(tmp_path, "qwen3-tied")
    tensors = hf_folders.tensors(tmp_path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    passes(tmp_path, gradients=True)


def test_a_correct_model_has_no_mismatch(subject, locate_mismatch):
    assert locate_mismatch(subject) is None


@pytest.mark.parametrize("rope", ["base", "scaling"])
def test_rope(rope, subject, locate_mismatch):
    right = subject.config.pattern[0].rope
    wrong = Rope(right.theta * 1.2, right.scaling) if rope == "base" else Rope(right.theta)
    pattern = tuple(dataclasses.replace(kind, rope=wrong) for kind in subject.config.pattern)
    place = locate_mismatch(with_config(subject, pattern=pattern))
    assert (place.where, place.hf) == ("layers.0.attn", "model.layers.0.self_attn")
    assert place.what == "between q_proj, k_proj, v_proj, q_norm, k_norm and o_proj"
    assert place.suspects.startswith("rope") and "window" not in place.suspects
    assert place.position > 0  # at position 0 nothing turns


def test_window_off_by_one(subject, locate_mismatch):
    pattern = list(subject.config.pattern)
    pattern[LAYER] = dataclasses.replace(pattern[LAYER], window=WINDOW - 1)
    place = locate_mismatch(with_config(subject, pattern=tuple(pattern)))
    assert (place.where, place.position) == ("layers.1.attn", WINDOW - 1)
    assert place.suspects == f"window: the last of {TOKENS} tokens attends to {WINDOW}, ours to {WINDOW - 1}"


def test_swapped_gate_and_up_weights(subject, locate_mismatch):
    def swap(params):
        mlp = params["layers"]["mlp"]
        for one, other in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
            right = subject.params["layers"]["mlp"]
            mlp[one] = {"kernel": right[one]["kernel"].at[LAYER].set(right[other]["kernel"][LAYER])}

    place = locate_mismatch(with_params(subject, swap))
    assert (place.where, place.hf, place.what) == ("layers.1.mlp.gate_proj", "model.layers.1.mlp.gate_proj", "")


def test_swapped_gate_and_up_rows(folder, monkeypatch, locate_mismatch):
    """Modules are paired by rows, so the projections agree, but their use does not."""
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def change(row):
        part = row.ours.split(".")[-2]
        return dataclasses.replace(row, hf=row.hf.replace(part, other[part])) if part in other else row

    place = locate_mismatch(with_rows(monkeypatch, folder, change))
    assert (place.where, place.what) == ("layers.0.mlp", "between gate_proj, up_proj and down_proj")
    assert "gate and up swapped" in place.suspects


def test_o_proj_transposed(folder, monkeypatch, locate_mismatch):
    def change(row):
        return dataclasses.replace(row, ops=(Split(0),)) if row.ours == "layers.attn.o_proj.kernel" else row

    place = locate_mismatch(with_rows(monkeypatch, folder, change))
    assert (place.where, place.hf, place.what) == ("layers.0.attn.o_proj", "model.layers.0.self_attn.o_proj", "")
    assert "kernel" in place.suspects


@pytest.mark.parametrize(
    ("path", "layer", "where"),
    [
        (("layers", "mlp_norm", "scale"), 2, "layers.2.mlp_norm"),
        (("layers", "attn", "k_norm", "scale"), 1, "layers.1.attn.k_norm"),
        (("norm", "scale"), ..., "norm"),
        (("embed", "weight"), ..., "embed"),
        (("lm_head", "kernel"), ..., "lm_head"),
    ],
)
def test_an_offset_on_a_parameter(path, layer, where, subject, locate_mismatch):
    def shift(params):
        for key in path[:-1]:
            params = params[key]
        params[path[-1]] = params[path[-1]].at[layer].add(1)

    assert locate_mismatch(with_params(subject, shift)).where == where


def test_epsilon_of_the_norms(subject, locate_mismatch):
    assert locate_mismatch(with_config(subject, norm_eps=0.1)).where == "layers.0.input_norm"


def test_command_passes(folder):
    arguments = ["verify", str(folder), "--tokens", "90", "--layers", "--gradients", "--decode", "--json"]
    done = CliRunner().invoke(app, arguments)
    report = json.loads(done.stdout)
    assert (done.exit_code, report["passed"], report["mismatch"]) == (0, True, None), done.output
    names = [check["name"] for check in report["checks"]]
    assert {"round trip", "cached decode", "gradients", "logits float32, random ids"} <= set(names)
    first = next(check for check in report["checks"] if check["name"].startswith("logits"))
    ends = [point["path"] for point in report["layers"] if point["side"] == "out"]
    assert ends == ["embed", "layers.0", "layers.1", "layers.2", "norm", "lm_head"]
    assert [span["stop"] for span in first["ranges"]] == [90, 16, 64, 90]


def test_command_fails_and_names_the_place(folder, monkeypatch):
    def change(row):
        return dataclasses.replace(row, ops=(Split(0),)) if row.ours == "layers.attn.o_proj.kernel" else row

    with_rows(monkeypatch, folder, change)
    done = CliRunner().invoke(app, ["verify", str(folder), "--tokens", "40", "--dtype", "float32"])
    assert done.exit_code == 1
    verdict, place, *_ = done.stdout.splitlines()
    assert verdict.startswith("FAILED (logits float32, random ids, logits float64, random ids)")
    assert place.startswith("first mismatch at layers.0.attn.o_proj, in transformers model.layers.0.self_attn.o_proj")


def test_command_lists_all_import_errors(tmp_path):
    hf_folders.save(tmp_path, "qwen3")
    stored = hf_folders.tensors(tmp_path)
    stored["model.layers.1.mlp.surprise.weight"] = stored.pop("model.layers.0.mlp.up_proj.weight")
    stored["model.norm.weight"] = stored["model.norm.weight"][:-1]
    save_file(stored, tmp_path / "model.safetensors")
    done = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert done.exit_code == 1
    for words in (
        "FAILED (import)",
        "lacks tensor model.layers.0.mlp.up_proj.weight",
        "holds tensor model.layers.1.mlp.surprise.weight",
        "holds tensor model.norm.weight as [55], config.json says [56]",
    ):
        assert words in done.stdout


def test_without_torch_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"jaxtrain\[verify\]"):
        Reference(folder, "float32")
