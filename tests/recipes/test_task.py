"""A model is evaluated on a file of questions."""

import json

import numpy as np
import pytest
import yaml
from hf_folders import save
from typer.testing import CliRunner

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.cli import app
from jaxtrain.recipes.task import load_task, run_task
from jaxtrain.sample.requests import Request, SamplingParams
from jaxtrain.serve.served import load_served

QUESTIONS = ["ab", "c", "what", "is it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("model") / "tiny", "llama", vocab_size=259, num_hidden_layers=1)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def served(folder):
    return load_served(folder, dtype="float32", max_length=96, slots=8)


def task(place, **section):
    file = place / "task.yaml"
    file.write_text(yaml.safe_dump({"prompts": {"path": str(place / "rows.jsonl")}, "max_new_tokens": 6} | section))
    return file


def write_rows(place, answers):
    rows = [{"prompt": question, "answer": answer} for question, answer in zip(QUESTIONS, answers, strict=True)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_share_of_right_answers_with_its_standard_error(served, tmp_path):
    params = served.ending(SamplingParams(6, temperature=0))
    greedy = [served.engine.generate([Request(served.prompt_ids({"prompt": each}), params)]) for each in QUESTIONS]
    answers = [completion.text for (((completion,),),) in zip(greedy, strict=True)]
    write_rows(tmp_path, [*answers[:3], "something else"])
    found = run_task(served, load_task(task(tmp_path)))
    assert found["prompts"] == 4 and found["exact_match"] == 0.75
    assert found["exact_match_std_error"] == pytest.approx(np.std([1, 1, 1, 0], ddof=1) / 2)
    lengths = [len(completion.ids) for (((completion,),),) in zip(greedy, strict=True)]
    assert found["length"] == pytest.approx(np.mean(lengths)) and found["length_max"] == max(lengths)
    assert run_task(served, load_task(task(tmp_path, generate=2)))["prompts"] == 2


def test_rewards_judge_several_samples(served, tmp_path):
    write_rows(tmp_path, ["1"] * 4)
    (tmp_path / "judges.py").write_text(
        "def even(completions, **_):\n    return [1.0 - len(c) % 2 for c in completions]\n"
    )
    section = {"samples": 2, "temperature": 1.0, "rewards": [{"function": f"{tmp_path / 'judges.py'}:even"}]}
    found = run_task(served, load_task(task(tmp_path, greedy=True, **section)))
    assert found["rewards/even"] == found["reward"] == found["rewards/even/pass@1"]
    assert found["rewards/even/pass@2"] >= found["rewards/even"] and "greedy_rewards/even" in found
    assert found == run_task(served, load_task(task(tmp_path, greedy=True, **section)))  # the same draws


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"prompts": None}, "`prompts: {path: FILE}` among them"),
        ({"every": 5}, "every is only for a run that trains"),
        ({"sample": 5}, "unknown key eval.sample; did you mean eval.samples"),
        ({"samples": 2}, "would all be equal: give a temperature"),
    ],
)
def test_mistakes_in_a_task_are_named_before_a_model_is_loaded(tmp_path, section, message):
    done = CliRunner().invoke(app, ["eval", "nowhere", "--task", str(task(tmp_path, **section))])
    assert isinstance(done.exception, ValueError) and message in str(done.exception)


def test_the_command_prints_a_table_or_json(folder, tmp_path):
    write_rows(tmp_path, ["1"] * 4)
    options = ["--task", str(task(tmp_path)), "--dtype", "float32", "--max-length", "96", "--slots", "8"]
    found = json.loads(CliRunner().invoke(app, ["eval", str(folder), "--json", *options]).stdout)
    assert found["model"] == str(folder) and found["metrics"]["prompts"] == 4
    lines = CliRunner().invoke(app, ["eval", str(folder), *options]).stdout.splitlines()
    shown = {line.split()[0]: float(line.split()[1]) for line in lines}
    assert shown["exact_match"] == found["metrics"]["exact_match"] and "±" in lines[1]
    assert not any(name.endswith("_std_error") for name in shown)
