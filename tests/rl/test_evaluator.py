"""The held-out reward of a policy: means over what has a reward, of prompts that training never numbers."""

import json
import math
from types import SimpleNamespace

from trajectories import trajectory

from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain.config import parse_config
from jaxtrain.data.formats import Encoder
from jaxtrain.rl.evaluator import eval_rewards


class Sampler:
    def __init__(self):
        self.prompts, self.versions = [], []

    def set_params(self, params, version):
        self.versions.append(version)

    def sample(self, prompts, samples):
        self.prompts += prompts
        return [
            [trajectory(number=n, sample=each)._replace(prompt=p) for each in range(samples)]
            for n, p in enumerate(prompts)
        ]


def scored(rewards):
    """A scorer that gives these rewards, NaN where there is none."""

    def score(trajectories):
        return [
            t._replace(reward=r, rewards={"right": r, "short": 1.0}) for t, r in zip(trajectories, rewards, strict=True)
        ]

    return score


def evaluator(tmp_path, sampler, scorer, generate=3):
    write_byte_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{n}?", "answer": n}) + "\n" for n in range(5)))
    file = {"path": str(tmp_path / "rows.jsonl")}
    tree = {
        "recipe": "rl",
        "model": {"path": "base"},
        "data": {"train": file, "max_length": 128} | ({"eval": file} if generate else {}),
        "train": {"steps": 1},
        "eval": {"generate": generate},
        "rl": {"environment": {"factory": "my_game.py:Game"}, "max_completion_length": 8},
    }
    encode = Encoder(load_tokenizer(tmp_path / "tokenizer"))
    session = SimpleNamespace(config=parse_config(tree, "test"), tokenizer=object(), stop_ids=lambda role: [])
    policy = SimpleNamespace(snapshot=lambda: ({}, 7))
    return eval_rewards(session, policy, encode, scorer, sampler=sampler)


def test_rewards_are_means_over_the_samples_that_have_one(tmp_path):
    sampler = Sampler()
    metrics = evaluator(tmp_path, sampler, scored([1.0, math.nan, 0.0]))()
    errors = {name: metrics.pop(name) for name in list(metrics) if name.endswith("_std_error")}
    assert metrics == {"eval_reward": 0.5, "eval_rewards/right": 0.5, "eval_rewards/short": 1.0}
    assert errors["eval_reward_std_error"] == 0.5 and errors["eval_rewards/short_std_error"] == 0
    assert sampler.versions == [7]  # the weights of the step
    assert [prompt.columns["answer"] for prompt in sampler.prompts] == [0, 1, 2]
    assert min(prompt.number for prompt in sampler.prompts) >= 1 << 31  # no training prompt's number, and so its seed


def test_a_reward_that_no_sample_has_is_left_out(tmp_path):
    metrics = evaluator(tmp_path, Sampler(), scored([math.nan] * 3))()
    assert metrics == {"eval_rewards/short": 1.0, "eval_rewards/short_std_error": 0.0}


def test_there_is_none_without_questions(tmp_path):
    assert evaluator(tmp_path, Sampler(), scored([]), generate=0) is None
