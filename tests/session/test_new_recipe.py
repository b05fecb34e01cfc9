"""A new objective and its recipe are two short files, and their losses are correct."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from dpo_recipe import run

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.config import parse_config
from jaxtrain.session.record import read_metrics

FILES = [Path(__file__).parent.parent / name for name in ("dpo_objective.py", "dpo_recipe.py")]
MODEL = tiny.HF_CONFIG | {"vocab_size": 259, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("dpo")
    write_byte_tokenizer(place / "tokenizer")
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"What is {a} + {b}?", "chosen": str(a + b), "rejected": f"{a + b + 1}, " * int(rng.integers(1, 4))}
        for a, b in rng.integers(0, 50, (64, 2)).tolist()
    ]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def train(place, name, **data):
    tree = {
        "recipe": "sft",
        "run": {"dir": str(place / name)},
        "model": {"config": MODEL, "tokenizer": str(place / "tokenizer"), "compute_dtype": "float32"},
        "data": {"train": {"path": str(place / "pairs.jsonl")}, "max_length": 96, "shuffle": False, **data},
        "train": {"steps": 12, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
        "log": {"every": 1, "to": []},
    }
    run(parse_config(tree, "test"))
    return read_metrics(place / name)


def test_dpo_and_its_recipe_are_two_short_files(place):
    assert sum(len(file.read_text().splitlines()) for file in FILES) < 120
    lines = train(place, "packed")
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert lines[-1]["rewards/accuracies"] > 0.9 and lines[-1]["loss"] < 0.6


def test_packed_pairs_have_the_loss_of_separate_pairs(place):
    """One pair per row and two pairs per row have the same losses in the first two steps of four pairs."""
    alone = train(place, "alone", packing=False)
    assert alone[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert alone[-1]["rewards/accuracies"] > 0.9
