"""On-policy distillation and self-distillation: recipe rl with a teacher."""

import json
import shutil

import commands
import numpy as np
import pytest
from aligned_tokenizers import pieces
from recipe_runs import losses, write_teacher
from safetensors.numpy import load_file, save_file

from converters.tokenizer import save_tokenizer, write_byte_tokenizer
from jaxtrain.config import parse_config
from jaxtrain.data.arithmetic import write_arithmetic
from jaxtrain.recipes.replay import replay
from jaxtrain.recipes.run import run
from jaxtrain.rl.trajectories import read_step

FOUR_DEVICES = {"preset": "fsdp_tensor", "tensor": 2, "fsdp": 2}  # whose rows are split in two
CLOCKS = ("seconds", "time", "per_second", "memory", "mfu", "goodput", "engine")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on-policy")
    write_byte_tokenizer(folder / "tokenizer")
    write_learnable(folder / "teacher", 300)
    write_arithmetic(folder, train_rows=64, eval_rows=8, seed=0)
    return folder


def write_learnable(folder, vocab_size, favours=None):
    """A model that favours some tokens in every context, which is soon learned. `favours` [vocab_size]: how much."""
    scale = {} if favours is None else {"initializer_range": 0.02}
    write_teacher(folder, tie_word_embeddings=False, vocab_size=vocab_size, **scale)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][:, 0] = 3
    random = np.random.default_rng(0).normal(0, 0.4, vocab_size)
    weights["lm_head.weight"][:, 0] = random if favours is None else favours
    save_file(weights, file, {"format": "pt"})


def tree(place, algorithm, *, prompts=4, model=None, teacher=None, steps=2, **sections):
    held_out = {"path": str(place / "eval.jsonl")} if sections.get("eval", {}).get("generate") else None
    return {
        "recipe": "rl",
        "model": {
            "config": commands.MODEL | {"hidden_size": 32, "max_position_embeddings": 128},
            "tokenizer": str(place / "tokenizer"),
            "compute_dtype": "float32",
            "remat": "none",
            **(model or {}),
        },
        "teacher": teacher or {"path": str(place / "teacher")},
        "data": {
            "train": {"path": str(place / "train.jsonl")},
            "eval": held_out,
            "max_length": 48,
        },
        "train": {"steps": steps},
        "optimizer": {"learning_rate": 0.02, "schedule": "constant"},
        "eval": {"every": steps},
        "log": {"every": 1, "to": []},
        "rl": {
            "algorithm": algorithm,
            "prompts": prompts,
            "generations": 4,
            "minibatches": 2,
            "max_completion_length": 8,
            "slots": 16,
        },
        **sections,
    }


def train(config, folder):
    run(parse_config(config | {"run": {"dir": str(folder)}}))
    return logged(folder)


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not any(clock in k for clock in CLOCKS)} for line in lines]


def test_the_reverse_kl_falls_and_a_run_stopped_between_two_updates_goes_on_exactly(place, tmp_path):
    sections = {"eval": {"every": 7, "generate": 8}, "checkpoint": {"every": 11}}  # a rollout has two updates
    config = tree(place, "on_policy_distillation", prompts=8, steps=14, **sections)
    whole = train(config, tmp_path / "whole")
    kls, held_out = losses(whole, "reverse_kl"), losses(whole, "eval_reverse_kl")
    assert len(kls) == 7 and kls[-2:].mean() < 0.7 * kls[:2].mean(), kls
    assert len(held_out) == 2 and held_out[1] < held_out[0], held_out
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "14")
    assert train(config, tmp_path / "killed") == whole
    # The advantages are those of the recorded log-probabilities, without a baseline.
    first = read_step(tmp_path / "whole", 1)
    mean = np.concatenate([t.advantages[t.loss_mask] for t in first]).mean()
    assert whole[0]["reverse_kl"] == pytest.approx(-mean, rel=1e-5)
    assert {t.reward for t in first} == {0.0}


def test_gkds_loss_is_that_of_recipe_distill_on_the_same_rows(place, tmp_path):
    evaluation = {"every": 2, "generate": 4}
    on_policy = tree(place, "gkd", objective={"kind": "reverse_kl", "temperature": 1.3}, eval=evaluation)
    on_policy["rl"]["minibatches"] = 1
    lines = train(on_policy, tmp_path / "gkd")
    samples = read_step(tmp_path / "gkd", 1)
    rows = [
        {
            "input_ids": [*t.prompt.ids.tolist(), *t.completion_ids.tolist()],
            "labels": [-100] * len(t.prompt.ids) + t.completion_ids.tolist(),
        }
        for t in samples
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    distill = {name: value for name, value in on_policy.items() if name not in ("rl", "eval")} | {
        "recipe": "distill",
        "data": {"train": {"path": str(file)}, "max_length": 48, "packing": False},
        "train": {"steps": 1, "batch_size": len(rows)},
    }
    expected = train(distill, tmp_path / "distill")
    for name in ("loss", "divergence", "entropy"):
        assert lines[0][name] == pytest.approx(expected[0][name], rel=1e-5)
    assert losses(lines)[1] < losses(lines)[0] and losses(lines, "eval_divergence")[0] > 0


def test_self_distillation_is_the_same_wherever_it_runs_and_when_it_is_replayed(place, tmp_path):
    """Under LoRA, whose base is the teacher, with rewards beside it; replayed with the teacher on its own devices."""
    prompt = "{prompt} The answer is {answer}, which is the sum of the two numbers."
    config = tree(place, "on_policy_distillation", model={"lora": {"rank": 2}}, teacher={"privileged_prompt": prompt})
    config["rl"] |= {"rewards": [{"function": "exact_answer"}], "reward_workers": 1}
    config["optimizer"] = {"learning_rate": 0.3, "schedule": "constant"}
    lines = train(config | {"train": {"steps": 3}}, tmp_path / "run")
    kls = losses(lines, "reverse_kl")
    assert len(kls) == 2 and np.abs(kls).min() > 1e-4  # the teacher reads more than the student
    assert "reward" in lines[0]
    elsewhere = [f"mesh={json.dumps(FOUR_DEVICES)}", "train.microbatches=2", "teacher.devices=4"]
    result = replay(tmp_path / "run", tmp_path / "replay", elsewhere)
    assert result.steps == 3 and result.difference < 2e-5
    np.testing.assert_allclose(losses(logged(tmp_path / "replay"), "reverse_kl"), kls, rtol=1e-4)


def test_a_teacher_with_another_tokenizer_scores_the_text_of_samples(place, tmp_path):
    """The student's tokens are bytes, the teacher's are pieces of several."""
    write_learnable(tmp_path / "teacher", len(pieces()))
    save_tokenizer(pieces(), tmp_path / "teacher")
    config = tree(place, "on_policy_distillation", prompts=8, steps=8, teacher={"path": str(tmp_path / "teacher")})
    with pytest.raises(ValueError, match=r"recipe rl with teacher.aligned=true"):
        train(config, tmp_path / "refused")
    config["teacher"]["aligned"] = True
    lines = train(config, tmp_path / "run")
    kls, aligned = losses(lines, "reverse_kl"), losses(lines, "teacher_aligned")
    assert len(kls) == 4 and np.isfinite(kls).all()
    assert aligned.min() > 0 and aligned.max() <= 1
    config["sampling"] = {"top_k": 8}
    with pytest.raises(ValueError, match=r"sampling.top_k=8 filters the student's tokens"):
        train(config, tmp_path / "filtered")


def test_golds_loss_is_that_of_recipe_distill_on_rows_with_the_samples_texts(place, tmp_path):
    """The teacher's tokens are pieces of several bytes; the student samples words of letters that end."""
    write_learnable(tmp_path / "teacher", len(pieces()))
    save_tokenizer(pieces(), tmp_path / "teacher")
    tokenizer = write_byte_tokenizer(tmp_path / "student")
    favours = np.full(len(tokenizer), -3.0, np.float32)
    favours[tokenizer("abcdefghijklmnop")["input_ids"]] = 0
    favours[tokenizer.eos_token_id] = 0.2
    write_learnable(tmp_path / "student", len(tokenizer), favours)
    config = tree(
        place,
        "gold",
        steps=8,
        model={"path": str(tmp_path / "student"), "config": None},
        teacher={"path": str(tmp_path / "teacher")},
        eval={"every": 4, "generate": 8},
        optimizer={"learning_rate": 0.005, "schedule": "constant"},
        checkpoint={"every": 7},  # between the two updates on the same samples
    )
    config["data"]["max_length"], config["rl"]["max_completion_length"] = 112, 64
    whole = train(config, tmp_path / "whole")
    held_out = losses(whole, "eval_hybrid")
    assert len(held_out) == 2 and losses(whole, "aligned").min() > 0.9 and held_out[1] < held_out[0], held_out
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "8")
    assert train(config, tmp_path / "killed") == whole
    mesh = [f"mesh={json.dumps(FOUR_DEVICES)}", "train.microbatches=2", "teacher.devices=4"]
    assert replay(tmp_path / "whole", tmp_path / "replay", mesh).steps == 8
    np.testing.assert_allclose(losses(logged(tmp_path / "replay")), losses(whole), rtol=2e-4)

    samples = read_step(tmp_path / "whole", 1)
    assert {t.finish_reason for t in samples} == {"stop"}
    samples = samples[: len(samples) // 2]  # of the first update
    file = tmp_path / "rows.jsonl"
    rows = ({"messages": [*t.prompt.columns["prompt"], {"role": "assistant", "content": t.text}]} for t in samples)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    distill = {name: value for name, value in config.items() if name not in ("rl", "eval", "checkpoint")} | {
        "recipe": "distill",
        "objective": "GOLD",
        "data": {"train": {"path": str(file)}, "max_length": 112, "packing": False},
        "train": {"steps": 1, "batch_size": len(samples)},
    }
    (expected,) = train(distill, tmp_path / "distill")
    for name in ("loss", "hybrid", "matched", "aligned", "entropy"):
        assert whole[0][name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize(
    ("algorithm", "teacher", "sections", "message"),
    [
        ("gkd", {"devices": 4}, {"mesh": FOUR_DEVICES}, "teacher.devices=4: a step has a multiple of 2 rows"),
        ("on_policy_distillation", {"privileged_prompt": "{prompt} {worked}"}, {}, "reads the column 'worked'"),
        (
            "on_policy_distillation",
            {"privileged_prompt": "{prompt} {worked}"},
            {"eval": {"generate": 2}},
            "reads the column 'worked'",
        ),
    ],
)
def test_what_cannot_be_run_is_named_before_the_first_step(place, tmp_path, algorithm, teacher, sections, message):
    config = tree(place, algorithm, teacher={"path": str(place / "teacher")} | teacher, **sections)
    if "eval" in sections:  # the training data have the column
        rows = [json.loads(line) | {"worked": "so"} for line in (place / "train.jsonl").read_text().splitlines()]
        (tmp_path / "worked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config["data"] = config["data"] | {"train": {"path": str(tmp_path / "worked.jsonl")}}
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
