"""What `jaxtrain preview` prints is what the run then does, and no model is needed for it."""

import io
import json
import re
from pathlib import Path

import commands
import fsspec
import pytest
from rich.console import Console

from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain.config import parse_config
from jaxtrain.data.formats import Encoder
from jaxtrain.data.packing import bundle_tokens
from jaxtrain.data.pairs import answer_encoder
from jaxtrain.data.sources import DataError
from jaxtrain.recipes import sft
from jaxtrain.recipes.preview import preview
from jaxtrain.session.record import read_metrics


@pytest.fixture
def tree(tmp_path):
    """A folder with a config.json and a tokenizer, and no weights; data of which a row is refused and one is cut."""
    write_byte_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(commands.MODEL))
    rows = [{"prompt": f"{n} + {n}?", "completion": str(2 * n)} for n in range(40)]
    rows[1] = {"prompt": "what?", "completion": ""}
    rows[2] = {"prompt": "Which?", "completion": "x" * 100}
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "recipe": "sft",
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(tmp_path / "model"), "compute_dtype": "float32"},
        "data": {"train": {"path": str(tmp_path / "sums.jsonl")}, "max_length": 64, "on_bad_row": "skip"},
        "train": {"epochs": 2, "batch_size": 8},
        "optimizer": {"warmup_ratio": 0.2},
        "log": {"every": 1, "to": []},
    }


def shown(tree, **options):
    file = io.StringIO()
    preview(parse_config(tree, "test"), console=Console(file=file, width=200, **options), rows=3)
    return file.getvalue()


def test_piped_output_is_plain_and_brackets_what_is_trained(tree):
    text = shown(tree)
    assert "sums: 40 rows, weight 1" in text
    assert "sums.jsonl:1: " in text and "0 + 0?<|im_end|>\n<|im_start|>assistant\n⟦0<|im_end|>⟧\n" in text
    assert "refused: " in text and "sums.jsonl:2: " in text
    assert "64 tokens, " in text and "truncated from 1" in text
    assert "39 examples of " in text and "of all rows: 1 truncated, 1 bad rows\n" in text
    assert "\x1b" not in text


def test_a_terminal_shows_what_is_trained_in_green(tree):
    text = shown(tree, force_terminal=True, color_system="standard")
    assert "\x1b[32m0\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in text and "⟦" not in text


def test_the_files_of_a_folder_are_listed(tree, tmp_path):
    (tmp_path / "many").mkdir()
    for number in range(12):
        (tmp_path / "many" / f"{number:02}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    tree["data"]["train"]["path"] = str(tmp_path / "many")
    text = shown(tree)
    assert "  12 files:" in text and "many/09.jsonl\n  ...\n" in text and "10.jsonl" not in text


def test_what_is_left_out_is_said_of_each_row(tree, tmp_path):
    """By a template that keeps the thought of the last turn alone."""
    thoughtful = {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    row = {"messages": [{"role": "user", "content": "a"}, thoughtful] * 2}
    (tmp_path / "sums.jsonl").write_text((json.dumps(row) + "\n") * 3)
    (tmp_path / "last.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if loop.last and m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
        "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tree["model"]["chat_template"] = str(tmp_path / "last.jinja")
    tree["data"]["split_turns"] = False
    text = shown(tree)
    assert text.count("warning: turns are trained without the thoughts") == 1
    assert "chat template: " in text and "data.split_turns=false: " in text
    assert text.count(", thoughts left out\n") == 3
    tree["data"]["split_turns"] = True
    assert "thoughts left out\n" not in (text := shown(tree)) and text.count("tokens, ") >= 6


def test_a_row_that_makes_no_example_is_shown(tree, tmp_path):
    pairs = [{"prompt": "a", "chosen": "b", "rejected": rejected} for rejected in ("b", "c")]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tree |= {"recipe": "preference", "train": {"steps": 1, "batch_size": 8}}
    assert "sums.jsonl:1: no example: equal pairs\n" in shown(tree)


@pytest.mark.parametrize(("mesh", "times"), [({}, "once"), ({"context": 2}, "twice")])
def test_a_pairs_prompt_counts_as_often_as_it_is_packed(tree, tmp_path, mesh, times):
    pairs = [{"prompt": f"{n}?", "chosen": str(n), "rejected": "no"} for n in range(10, 18)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tree |= {"recipe": "preference", "train": {"epochs": 1, "batch_size": 8}, "mesh": mesh}
    encode = answer_encoder(parse_config(tree), Encoder(load_tokenizer(tmp_path / "model")))
    tokens = sum(bundle_tokens(encode(pair), times == "once") for pair in pairs)
    text = shown(tree)
    assert f"a pair's prompt is in a row {times}" in text and f"8 examples, {tokens:,} tokens" in text


def test_weights_other_than_one_are_shown(tree, tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]}
    (tmp_path / "sums.jsonl").write_text(json.dumps(row) + "\n")
    assert "⟦0.5: b<|im_end|>⟧" in shown(tree)


def test_steps_and_schedule_are_those_of_the_run(tree, recwarn):
    text = shown(tree)
    tree["model"] = {"config": commands.MODEL, "tokenizer": tree["model"]["path"], "compute_dtype": "float32"}
    metrics = sft.run(parse_config(tree, "test")).metrics
    steps = len(read_metrics(Path(tree["run"]["dir"])))
    assert f"the run: 80 rows, 78 examples, {metrics['num_tokens']:,} tokens\n  packed to" in text
    assert f": {steps} steps of 8 x 64 tokens" in text
    assert f"learning rate: cosine, 2e-05 after {-(-steps // 5)} steps of warm-up, 0 at the end, step {steps}" in text


def test_rows_that_end_the_run_are_counted_and_named(tree):
    tree["data"]["on_bad_row"] = "error"
    with pytest.warns(UserWarning, match="skipped a bad row"):
        text = shown(tree)
    assert "1 rows are refused: the run ends at the first" in text


def test_without_end_an_epoch_is_counted(tree):
    tree["train"] = {"steps": 7, "batch_size": 8}
    text = shown(tree)
    assert "an epoch: 40 rows, 39 examples" in text and "0 at the end, step 7" in text


def test_a_run_that_ends_before_its_data_has_one_number_of_steps(tree):
    tree["data"]["train"]["epochs"] = 3
    tree["train"] = {"steps": 2, "batch_size": 8}
    text = shown(tree)
    assert re.search(
        r"the data: 120 rows.*\n.*\nthe run: 2 of these \d+ steps \(train\.steps\)\nlearning .* step 2$", text
    )
    rl = {"rewards": [{"function": "exact_answer"}], "prompts": 4, "generations": 2, "max_completion_length": 8}
    text = shown(tree | {"recipe": "rl", "rl": rl, "train": {"steps": 2}})
    assert "the data: 120 prompts, 30 steps" in text and "the run: 2 of these 30 steps" in text


def test_data_of_which_every_row_is_refused_name_the_first_errors(tree, tmp_path):
    (tmp_path / "sums.jsonl").write_text('{"prompt": "a", "completion": ""}\n{"prompt": 1}\n' * 4)
    with pytest.raises(DataError) as error, pytest.warns(UserWarning, match="skipped"):
        shown(tree)
    assert re.search(
        r"of 8 rows.*\n  .*sums\.jsonl:1: .*\n  .*sums\.jsonl:2: .*\n  .*sums\.jsonl:3: ", str(error.value)
    )
    assert "on_bad_row" not in str(error.value)


def test_prompts_of_reinforcement_learning(tree):
    rl = {"rewards": [{"function": "exact_answer"}], "prompts": 4, "generations": 2, "max_completion_length": 8}
    text = shown(tree | {"recipe": "rl", "rl": rl | {"iterations": 3}, "train": {"epochs": 2}})
    assert "0 + 0?<|im_end|>\n<|im_start|>assistant\n" in text and "⟦" not in text
    assert "the run: 80 prompts, 60 steps\n  4 prompts x 2 samples make 3 steps" in text
    assert "step 60" in text


@pytest.mark.parametrize("backend", ["jaxtrain", "torchax"])
def test_weights_of_a_remote_model_are_not_copied(tree, tmp_path, monkeypatch, backend):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"memory://models/{tmp_path.name}-{backend}"
    (tmp_path / "model" / "model.safetensors").write_bytes(b"large")
    filesystem, folder = fsspec.core.url_to_fs(url)
    filesystem.put(f"{tmp_path / 'model'}/", folder, recursive=True)
    tree["model"] |= {"path": url, "backend": backend}
    assert "⟦0<|im_end|>⟧" in shown(tree)
    copied = {path.name for path in (tmp_path / "cache").rglob("*")}
    assert "config.json" in copied and "model.safetensors" not in copied


def some_rows(count=2):
    yield from ({"prompt": f"{n}?", "completion": "x"} for n in range(count))


@pytest.mark.parametrize("recipe", ["sft", "rl"])
def test_of_a_stream_the_steps_must_be_given(tree, recipe):
    tree["data"]["train"] = {"source": some_rows}
    if recipe == "rl":
        rl = {"rewards": [{"function": "exact_answer"}], "prompts": 4, "generations": 2, "max_completion_length": 8}
        tree |= {"recipe": recipe, "rl": rl}
    for section, train in (({}, {"epochs": 1}), ({"epochs": 1}, {})):
        tree["data"]["train"] |= section
        tree["train"] = train if recipe == "rl" else {"batch_size": 8} | train
        with pytest.raises(ValueError, match=r"the length of source:.* is not known, .*: give train\.steps"):
            shown(tree)
    tree["train"]["steps"] = 7
    text = shown(tree)  # asks for a row more than there are
    assert "1?<|im_end|>" in text and "a source is a stream\nlearning rate: " in text


def test_totals_fit_into_80_columns(tree):
    *_, totals = shown(tree).split("\n\n")
    assert "packed to" in totals and max(map(len, totals.splitlines())) <= 80


def test_ids_without_a_tokenizer(tree, tmp_path):
    (tmp_path / "sums.jsonl").write_text('{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}\n')
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer_config.json").unlink(missing_ok=True)
    tree["model"] = {"config": commands.MODEL}
    assert "5 ⟦6 7 ⟧" in shown(tree)
