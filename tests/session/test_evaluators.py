"""Held-out loss does not depend on packing, and exact match is the share of the model's own answers."""

import json

import commands
import numpy as np
import pytest

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.config import parse_config
from jaxtrain.data.sources import DataError
from jaxtrain.objectives.sft import SFT
from jaxtrain.session.evaluators import answer_prompts, exact_match, held_out_loss
from jaxtrain.session.session import Session

MODEL = commands.MODEL | {"max_position_embeddings": 128, "initializer_range": 0.3}
ROWS = [{"prompt": f"Say {number}" + "!" * number, "completion": str(number)} for number in range(11)]


class NoState:
    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def measured(tmp_path, make, rows=ROWS, generate=11, evaluation=None, **data):
    """`make(session, role, encode)`: an evaluator, whose metrics are returned. `evaluation`: keys of `eval`."""
    write_byte_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = {"path": str(tmp_path / "rows.jsonl")}
    tree = {
        "recipe": "sft",
        "run": {"dir": str(tmp_path / "run")},
        "model": {"config": MODEL, "tokenizer": str(tmp_path / "tokenizer"), "compute_dtype": "float32"},
        "data": {"train": file, "eval": file, "max_length": 96, **data},
        "train": {"steps": 1, "batch_size": 8},
        "eval": {"generate": generate, "max_new_tokens": 4} | (evaluation or {}),
        "log": {"to": []},
    }
    with Session.open(parse_config(tree, "test")) as session:
        role = session.trained_role("policy", SFT())
        session.restore(role, data=NoState())
        return make(session, role, session.encoder(role))


def loss(session, role, encode):
    return held_out_loss(session, role, SFT(), encode)()


def match(session, role, encode):
    return exact_match(session, role, encode)()["eval_exact_match"]


def test_held_out_loss_is_that_of_every_row_alone(tmp_path):
    packed, alone = (measured(tmp_path, loss, packing=packing) for packing in (True, False))
    assert packed["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)
    assert packed["eval_perplexity"] == pytest.approx(np.exp(packed["eval_loss"]), rel=1e-4)


def test_exact_match_is_the_share_of_rows_that_the_model_answers_so(tmp_path):
    def answers(session, role, encode):
        prompts = [encode.prompt(row).input_ids for row in ROWS]
        return [each.text for (each,) in answer_prompts(session, role, prompts)]

    texts = measured(tmp_path, answers)
    rows = [
        row | {"completion": text if n < 3 else text + "?"}
        for n, (row, text) in enumerate(zip(ROWS, texts, strict=True))
    ]
    assert all(text.strip() for text in texts)
    assert measured(tmp_path, match, rows) == pytest.approx(3 / 11)
    assert measured(tmp_path, match, rows, generate=4) == pytest.approx(3 / 4)  # the first four


def test_greedy_answers_are_judged_beside_the_sampled_ones(tmp_path):
    """Each as if they were evaluated alone, by exact match and by rewards."""
    from jaxtrain.rl.evaluator import eval_rewards

    (tmp_path / "odd.py").write_text(
        "def odd(completion_ids, **_):\n    return [float(sum(ids) % 2) for ids in completion_ids]\n"
    )
    rewards = [{"function": f"{tmp_path / 'odd.py'}:odd"}]

    def matches(session, role, encode):
        return exact_match(session, role, encode)()

    def rewarded(session, role, encode):
        return eval_rewards(session, role, encode)()

    sampled = {"temperature": 1.5, "samples": 2}
    for make, given in ((matches, {}), (rewarded, {"rewards": rewards})):
        together = measured(tmp_path, make, evaluation={**given, **sampled, "greedy": True})
        alone = measured(tmp_path, make, evaluation={**given, **sampled})
        greedy = measured(tmp_path, make, evaluation=given)
        expected = alone | {name.replace("eval_", "eval_greedy_", 1): value for name, value in greedy.items()}
        assert together == expected and len(together) == len(alone) + len(greedy)
    assert "eval_rewards/odd/pass@2" in together and 0 < together["eval_greedy_rewards/odd"] < 1


def test_a_row_that_is_no_question_is_an_error_or_left_out(tmp_path):
    rows = [{"text": "no question"}, *ROWS]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: only conversations"):
        measured(tmp_path, match, rows)
    with pytest.warns(UserWarning, match=r"rows\.jsonl:1: only conversations"):
        skipping = measured(tmp_path, match, rows, on_bad_row="skip")
    assert skipping == measured(tmp_path, match)
