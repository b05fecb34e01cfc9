"""The Python API: a model is sampled from during training, saved, loaded, and sampled from again."""

import pytest
from hf_folders import save as save_random

import jaxtrain as jt
from converters.tokenizer import write_byte_tokenizer

ROWS = [{"prompt": f"{number}?", "completion": str(number)} for number in range(40)]
GREEDY = jt.SamplingParams(max_tokens=6, temperature=0)
PROMPTS = ["3?", {"messages": [{"role": "user", "content": "a longer question?"}]}, {"prompt_ids": [5, 6, 7]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("generate")
    save_random(where / "model", "llama", vocab_size=259, num_hidden_layers=1)
    write_byte_tokenizer(where / "model")
    return where


def config(folder, name, rows=ROWS, steps=2, **model):
    return jt.parse_config(
        {
            "recipe": "sft",
            "run": {"dir": str(folder / name)},
            "model": {"path": str(folder / "model"), "compute_dtype": "float32", **model},
            "data": {"train": {"rows": rows}, "max_length": 64},
            "train": {"steps": steps},
            "optimizer": {"schedule": "constant", "learning_rate": 0.05},
            "log": {"every": 1, "to": []},
        }
    )


def texts(answers):
    return [[completion.text for completion in samples] for samples in answers]


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 2}}], ids=["full", "lora"])
def test_a_role_and_its_saved_folder_generate_the_same(folder, model):
    name = "lora" if model else "full"
    with jt.Session.open(config(folder, name, **model)) as session:
        policy = session.trained_role("policy", jt.objectives.SFT())
        batches = session.training_data(policy)
        session.restore(policy, data=batches)
        for batch in session.steps(batches):
            session.report(policy=policy.update(batch))
        answers = jt.generate(policy, PROMPTS, GREEDY, max_length=64)
        jt.save(policy, folder / f"{name}-saved")
    assert [len(samples) for samples in answers] == [1, 1, 1]
    loaded = jt.load(folder / f"{name}-saved", dtype="float32")
    assert texts(jt.generate(loaded, PROMPTS, GREEDY, max_length=64)) == texts(answers)
    untrained = jt.load(folder / "model", dtype="float32")
    assert texts(jt.generate(untrained, PROMPTS, GREEDY, max_length=64)) != texts(answers)
    # What the run's own checkpoint is exported to is the same.
    jt.export_run(folder / name, folder / f"{name}-exported")
    saved, exported = (folder / f"{name}-{how}" / "model.safetensors" for how in ("saved", "exported"))
    assert saved.read_bytes() == exported.read_bytes()


def test_a_run_on_rows_is_resumed_only_with_the_same_rows(folder):
    whole = jt.run(config(folder, "whole", steps=4))
    jt.run(config(folder, "parts", steps=2))
    with pytest.raises(ValueError, match=r"data\.train\.path: .*rows:"):
        jt.run(config(folder, "parts", ROWS[1:], steps=4))
    resumed = jt.run(config(folder, "parts", steps=4))
    assert resumed.metrics["loss"] == whole.metrics["loss"]
    assert resumed.metrics["num_tokens"] == whole.metrics["num_tokens"]


def test_a_prompt_that_cannot_be_used_is_named(folder):
    model = jt.load(folder / "model", dtype="float32")
    with pytest.raises(ValueError, match="prompts must be a list"):
        jt.generate(model, "3?", GREEDY)
    with pytest.raises(ValueError, match="prompt 2: a prompt row must have prompt"):
        jt.generate(model, ["3?", {"text": "3?"}], GREEDY)
    with pytest.raises(ValueError, match="prompt 1: "):
        jt.generate(model, ["3?" * 100], GREEDY, max_length=64)
