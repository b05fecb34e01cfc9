"""Failing commands print one message without a traceback and exit with 2."""

import sys
import warnings
from importlib.metadata import version

import commands
import pytest
import yaml

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.cli import main
from jaxtrain.data.arithmetic import write_arithmetic

MODEL = commands.MODEL | {"max_position_embeddings": 128, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_byte_tokenizer(folder / "tokenizer")
    files = write_arithmetic(folder, train_rows=20, eval_rows=2, seed=0)
    config = {
        "recipe": "sft",
        "run": {"dir": str(folder / "run")},
        "model": {"config": MODEL, "tokenizer": str(folder / "tokenizer"), "compute_dtype": "float32"},
        "data": {"train": {"path": str(files.train)}, "max_length": 64, "prompt_format": "plain"},
        "train": {"steps": 8, "batch_size": 8, "max_skipped_in_a_row": 2},
        "log": {"to": []},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    (folder / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    (folder / "file").write_text("")
    return folder


def said(place, monkeypatch, capsys, *arguments: str) -> str:
    """The output of a command that exits with 2."""
    monkeypatch.setattr(sys, "argv", ["jaxtrain", *(argument.format(place=place) for argument in arguments)])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # the command sets its own
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr().err
    assert ended.value.code == 2, printed
    assert "Traceback" not in printed
    return printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{place}/stf.yaml"], "did you mean {place}/sft.yaml?"),
        (["train", "{place}/sft.yaml", "train.step=1"], "unknown key train.step; did you mean train.steps?"),
        (["train", "{place}/sft.yaml", "data.train.path={place}/trian.jsonl"], "did you mean {place}/train.jsonl?"),
        (
            ["train", "{place}/sft.yaml", "data.train.path={place}/broken.jsonl"],
            ":2: broken",
        ),
        (["train", "{place}/sft.yaml", "model.config=null", "model.path=org/name"], "`hf download org/name`"),
        (["train", "{place}/sft.yaml", "run.dir={place}/file"], "{place}/file"),
        (["train", "{place}/sft.yaml", "train.batch_size=12"], "the nearest batch_size that does is"),
        (["train", "{place}/sft.yaml", "optimizer.learning_rate=1e38"], "not finite; their batches are in {place}/run"),
        (["train", "{place}/sft.yaml", "--learning_rate", "1e-4"], "without dashes, optimizer.learning_rate=1e-4"),
        (["plan", "{place}/sft.yaml", "--bf16"], "without dashes, model.compute_dtype=bfloat16"),
        (["export", "{place}", "{place}/out"], "{place} is not the folder of a run"),
        (["convert", "{place}/nowhere", "{place}/out"], "no checkpoint folder {place}/nowhere"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_an_error_is_one_message(place, monkeypatch, capsys, arguments, message):
    assert message.format(place=place) in said(place, monkeypatch, capsys, *arguments)


def test_an_option_outside_its_bounds_is_refused(place, monkeypatch, capsys):
    files = ("--prompts", "{place}/train.jsonl", "--out", "{place}/out.jsonl")
    assert "top_p=2.0 must be at most 1" in said(place, monkeypatch, capsys, "generate", "m", *files, "--top-p", "2")


def test_the_version_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxtrain", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert capsys.readouterr().out == f"jaxtrain {version('jaxtrain')}\n"
