import numpy as np
import pytest
from trajectories import trajectory

from jaxtrain.config import parse_config
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.rl.collect import Collected
from jaxtrain.rl.dealing import Deal
from jaxtrain.rl.experience import Experience, pack_samples
from jaxtrain.rl.pending import load_pending, remove_pending, save_pending


@pytest.fixture
def experience_on():
    """The experience of eight prompts with three samples each on one process, or on one of several."""
    tree = {
        "recipe": "rl",
        "run": {"dir": "run"},
        "model": {"config": {"model_type": "llama", "vocab_size": 101}, "tokenizer": "t"},
        "data": {"train": {"path": "prompts.jsonl"}, "max_length": 32},
        "train": {"steps": 8, "microbatches": 2},
        "optimizer": {"learning_rate": 0.1},
        "rl": {
            "prompts": 8,
            "minibatches": 2,
            "generations": 3,
            "max_completion_length": 8,
            "rewards": [{"function": "length"}],
        },
    }
    lengths = np.random.default_rng(0).integers(1, 9, 24).tolist()
    samples = [
        trajectory(length=lengths[index], number=10 + index // 3, sample=index % 3, left_out=index % 7 == 0)
        for index in range(24)
    ]

    def make(deal: Deal) -> Experience:
        config = parse_config(tree, "test")
        experience = pack_samples(Collected(samples, {}, 8), config, make_mesh(config.mesh), deal)
        advantages = [
            np.full(len(t.completion_ids), t.prompt.number + t.sample / 10, np.float32) for t in experience.own
        ]
        experience.spread_signal("advantages", advantages)
        return experience

    return make


def segments(rows):
    """Of each minibatch: what every sample trains on."""
    found = []
    for batch, numbers in rows:
        samples = []
        for row in range(len(batch.tokens)):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                at = batch.segment_ids[row] == segment
                arrays = (batch.tokens, batch.loss_weights, numbers, *(batch.signals[k] for k in sorted(batch.signals)))
                samples.append(tuple(array[row][at].tobytes() for array in arrays))
        found.append((sorted(samples), batch.left_out.sum(0).tolist()))
    return found


def saved(folder, experience_on, processes):
    experiences = [experience_on(Deal(process, processes)) for process in range(processes)]
    for experience in experiences:
        save_pending(folder, 5, experience.pending_rows(), experience.deal)
    return experiences


def merged(parts):
    """The minibatches of several processes as one."""
    found = [segments(part) for part in parts]
    pairs = [zip(*minibatch, strict=True) for minibatch in zip(*found, strict=True)]
    return [
        (sorted(sample for part in samples for sample in part), np.sum(left_out, 0).tolist())
        for samples, left_out in pairs
    ]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_same_number_of_processes_loads_the_same_rows(tmp_path, experience_on, processes):
    for experience in saved(tmp_path, experience_on, processes):
        loaded = load_pending(tmp_path, 5, processes, experience.deal, 16)
        resumed = Experience.resumed(loaded, 4, 1, experience.deal)
        for mine, theirs in zip(resumed.minibatches, experience.minibatches, strict=True):
            assert mine.batch.arrays().keys() == theirs.batch.arrays().keys()
            for name, array in mine.batch.arrays().items():
                np.testing.assert_array_equal(array, theirs.batch.arrays()[name])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (2, 4)])
def test_another_number_of_processes_loads_the_same_samples_in_the_same_minibatches(
    tmp_path, experience_on, before, after
):
    written = [experience.pending_rows() for experience in saved(tmp_path, experience_on, before)]
    deals = [Deal(process, after) for process in range(after)]
    loaded = [load_pending(tmp_path, 5, before, deal, 16) for deal in deals]
    assert merged(loaded) == merged(written)
    for deal, rows in zip(deals, loaded, strict=True):
        for batch, numbers in rows:
            assert len(batch.tokens) % 16 == 0
            assert all(deal.owns(number - 1) for number in np.unique(numbers) if number)


def test_a_missing_file_is_named_and_old_ones_are_removed(tmp_path, experience_on):
    saved(tmp_path, experience_on, 2)
    with pytest.raises(ValueError, match=r"5\.0-of-3\.npz is missing"):
        load_pending(tmp_path, 5, 3, Deal(), 16)
    remove_pending(tmp_path, {5})
    assert len(list(tmp_path.iterdir())) == 2
    remove_pending(tmp_path, {6})
    assert not list(tmp_path.iterdir())
