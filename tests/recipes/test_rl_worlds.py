"""All placements give the same run; prefetching; replay of another run's samples."""

import importlib.util
import json
import os
import random
import signal
import threading
from pathlib import Path

import commands
import numpy as np
import pytest
import ray_start
from recipe_runs import rl_tree

from converters.tokenizer import load_tokenizer
from jaxtrain.config import parse_config
from jaxtrain.recipes import rl
from jaxtrain.recipes.replay import replay
from jaxtrain.rl.ray_sampler import RaySampler
from jaxtrain.rl.trajectories import read_step, recorded_steps

DISJOINT = {"kind": "disjoint", "rollout_devices": 4}
MODEL = commands.MODEL | {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    (folder / "odd.py").write_text(
        "def odd(completion_ids, **_):\n    return [sum(token % 2 for token in ids) / 8 for ids in completion_ids]\n"
    )
    return folder


@pytest.fixture(scope="module")
def together(place):
    """The folder and losses of the colocated run, with which the others are compared."""
    losses = train(place, "together", placement={})
    assert max(abs(loss) for loss in losses) > 1e-3 and len(samples(place / "together")) == 2 * 16
    return place / "together", losses


def config_of(place: Path, name: str, placement: dict, max_length: int = 48, steps: int = 4, stops=(), **section):
    tree = rl_tree(
        place,
        run={"dir": str(place / name)},
        model={"config": MODEL | {"eos_token_id": list(stops)}},
        data={"max_length": max_length},
        train={"steps": steps},
        optimizer={"learning_rate": 0.01},
        checkpoint={"every": 1000},
        rl={
            "iterations": 2,  # on the first pass every ratio is 1, and the loss of a group is 0
            "rewards": [{"function": f"{place / 'odd.py'}:odd"}],
            "placement": placement,
            **section,
        },
    )
    return parse_config(tree, name)


def train(place: Path, name: str, placement: dict, **section) -> list[float]:
    assert rl.run(config_of(place, name, placement, **section)).exit_code == 0
    return column(place / name, "loss")


def column(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def samples(run: Path) -> list[list[int]]:
    return [t.completion_ids.tolist() for step in recorded_steps(run) for t in read_step(run, step)]


def test_disjoint_meshes_give_the_same_samples_and_losses(place, together):
    folder, expected = together
    losses = train(place, "disjoint", DISJOINT)
    assert samples(place / "disjoint") == samples(folder)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)
    assert column(place / "disjoint", "sync/bytes")[0] > 0


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.mark.slow
@needs_ray
def test_ray_workers_give_the_same_samples_and_losses(place, together, tmp_path):
    folder, expected = together
    ray_start.start(tmp_path)
    losses = train(place, "ray", {"kind": "ray"})
    assert samples(place / "ray") == samples(folder)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@needs_ray
def test_a_run_survives_a_killed_ray_worker(place, together, tmp_path, monkeypatch, caplog):
    folder, expected = together
    ray_start.start(tmp_path)
    sample, killed = RaySampler.sample, []

    def after_a_murder(sampler, prompts, samples):
        if prompts[0].number > 0 and not killed:  # the second rollout
            killed.append(sampler.process_ids()[0])
            os.kill(killed[0], signal.SIGKILL)
        return sample(sampler, prompts, samples)

    monkeypatch.setattr(RaySampler, "sample", after_a_murder)
    losses = train(place, "killed", {"kind": "ray"})
    assert killed and samples(place / "killed") == samples(folder)
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)
    assert column(place / "killed", "rollout/lost_workers") == [0, 1]
    assert "rollout worker 0 is lost: starting a new one" in caplog.text


STEPS = int(os.environ.get("JAXTRAIN_RAY_STEPS", "0"))  # 100: a worker is lost about every fifth step; takes minutes


@pytest.mark.slow
@needs_ray
@pytest.mark.skipif(not STEPS, reason="takes minutes: set JAXTRAIN_RAY_STEPS=100")
def test_an_asynchronous_run_survives_workers_killed_and_stopped_at_random(place, tmp_path, monkeypatch, caplog):
    ray_start.start(tmp_path)
    chosen, sent, hit, rollouts = random.Random(STEPS), [], set(), []
    set_params = RaySampler.set_params

    def set_and_signal(sampler, params, version):
        set_params(sampler, params, version)
        rollouts.append(version)
        usable = [worker for worker in sampler._workers if worker.start is None and worker not in hit]
        # The last ones early enough to be noticed; of a short run the first rollouts.
        if usable and len(rollouts) < STEPS - 3 and (STEPS < 10 or chosen.random() < 0.2):
            worker, how = chosen.choice(usable), (signal.SIGSTOP, signal.SIGKILL)[len(sent) % 2]
            pid = sampler._ray.get(worker.handle.process_id.remote())
            hit.add(worker)
            sent.append(how)
            timer = threading.Timer(
                chosen.random(), os.kill, (pid, how)
            )  # while it samples, receives weights, or idles
            timer.start()

    monkeypatch.setattr(RaySampler, "set_params", set_and_signal)
    placement = {"kind": "ray", "workers": 2, "staleness": 1, "worker_seconds": 30}
    losses = train(place, "lossy", placement, steps=STEPS, iterations=1)
    assert len(losses) == STEPS and np.isfinite(losses).all()
    steps = [read_step(place / "lossy", step) for step in recorded_steps(place / "lossy")]
    assert [len(samples) for samples in steps] == [16] * STEPS
    trained = {(t.prompt.number, t.sample) for samples in steps for t in samples}
    assert len(trained) == 16 * STEPS and max(trained) < (4 * (STEPS + 1), 0)  # those of one batch are under way
    lost, slow = (sum(column(place / "lossy", f"rollout/{kind}_workers")) for kind in ("lost", "slow"))
    assert sent.count(signal.SIGKILL) > 0 < sent.count(signal.SIGSTOP)
    # On a busy machine a worker that nobody stopped may be too slow as well.
    assert lost == sent.count(signal.SIGKILL) and slow >= sent.count(signal.SIGSTOP)
    assert caplog.text.count("is lost: starting") == lost and caplog.text.count("is too slow: starting") == slow


def test_prefetched_samples_respect_the_staleness(place, together):
    losses = train(place, "ahead", DISJOINT | {"staleness": 1}, iterations=1)
    assert len(losses) == 4 and samples(place / "ahead")[:16] == samples(together[0])[:16]
    stale = column(place / "ahead", "staleness/max")
    assert stale[0] == 0 and max(stale) == 1
    gap = column(place / "ahead", "sampling/sampling_logp_difference/max")
    assert max(gap) > 1e-3 > gap[0]  # what the importance correction is for


def test_a_replay_has_bit_identical_losses(place, together):
    folder, expected = together
    written = (folder / "config.yaml").read_text()  # the config is read in the checkpoint
    (folder / "config.yaml").write_text(written.replace("learning_rate: 0.01", "learning_rate: 0.5"))
    compared = replay(folder, place / "again")
    (folder / "config.yaml").write_text(written)
    assert column(place / "again", "loss") == expected
    assert compared == (4, 0.0)


BROKEN = """
import time
from jaxtrain.rl.environments import Opening, Reply

class Echo:
    def reset(self, row):
        self.turns = 0
        return Opening([{"role": "user", "content": row["prompt"][-1]["content"]}])

    def step(self, text):
        self.turns += 1
        if set(text) & set("vwxyz"):
            raise RuntimeError("no such letters, please")
        if set(text) & set("mn"):
            time.sleep(60)
        return Reply([{"role": "user", "content": "Again."}] if self.turns < 2 else (), reward=len(set(text)) / 8)

def slow(completions, **_):
    turns = [message["content"] for c in completions for message in c if message["role"] == "assistant"]
    while set("#$") & set("".join(turns)):
        time.sleep(0.01)
    return [0.0] * len(completions)
"""


@pytest.mark.parametrize("placement", [{}, DISJOINT | {"staleness": 1}], ids=["in turns", "each for itself"])
def test_failing_environments_and_rewards_lose_samples_and_do_not_end_the_run(place, caplog, placement):
    name = f"broken-{len(placement)}"
    (place / "broken.py").write_text(BROKEN)
    environment = {"factory": f"{place / 'broken.py'}:Echo", "max_turns": 2, "seconds": 0.5}
    rewards = [{"function": f"{place / 'broken.py'}:slow", "seconds": 0.2}]
    # A turn must end for the environment to be asked, and a random model seldom draws the template's token.
    changes = {"environment": environment, "rewards": rewards, "iterations": 1, "max_completion_length": 24}
    losses = train(place, name, placement, max_length=160, steps=2, stops=range(65, 72), **changes)
    assert len(losses) == 2
    errors, hung = column(place / name, "environment/errors"), column(place / name, "rewards/slow/timeout")
    lost, late = column(place / name, "rewards/lost"), column(place / name, "environment/timeouts")
    assert sum(errors) > sum(late) > 0 and sum(hung) > 0 and sum(lost) >= max(sum(errors), sum(hung))
    assert sum(lost) < 2 * 16 and "no such letters" in caplog.text and "took too long" in caplog.text
    assert "took longer than 0.5 seconds" in caplog.text
    talk = next(t for t in read_step(place / name, 1) if t.info["turns"] == 2 and np.isfinite(t.reward))
    assert not talk.loss_mask.all() and talk.rewards["environment"] > 0 and talk.text.count("Again.") == 1


def test_a_reward_model_scores_as_transformers_does(place):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(**{k: v for k, v in MODEL.items() if k != "model_type"}, num_labels=1)
    judge = transformers.LlamaForSequenceClassification(shape).eval()
    judge.save_pretrained(place / "judge")
    judges = [{"path": str(place / "judge"), "name": "judge", "weight": 2.0}]
    train(place, "judged", {}, rewards=[], reward_models=judges, steps=2)
    tokenizer = load_tokenizer(place / "tokenizer")
    closing = tokenizer("<|im_end|>\n")["input_ids"]  # as the text that a reward model is trained on
    ends = closing[0], tokenizer.eos_token_id
    for t in read_step(place / "judged", 1):
        words = t.completion_ids[: len(t.completion_ids) - (t.completion_ids[-1] in ends)]
        ids = torch.tensor(np.concatenate([t.prompt.ids, words, closing])[None].astype(np.int64))
        with torch.no_grad():
            expected = judge.score(judge.model(ids).last_hidden_state)[0, -1].item()
        assert t.rewards["judge"] == pytest.approx(expected, abs=1e-4) and t.reward == 2 * t.rewards["judge"]
    assert column(place / "judged", "rewards/judge/std")[0] > 1e-4
