import numpy as np
from trajectories import trajectory

from jaxtrain.rl.dealing import Deal


def test_every_prompt_belongs_to_one_process_and_is_sampled_where_it_belongs():
    for processes, each in ((1, 1), (4, 1), (4, 2), (4, 4)):
        deals = [Deal(process, processes, each) for process in range(processes)]
        for number in (*range(9), 1 << 31):
            assert sum(deal.owns(number) for deal in deals) == 1
            assert sum(deal.samples(number) for deal in deals) == each
            assert all(deal.samples(number) for deal in deals if deal.owns(number))


def test_a_range_of_prompts_has_as_many_on_each_process_within_one():
    deals = [Deal(process, 4) for process in range(4)]
    for start, stop in ((0, 8), (3, 9), (5, 18)):
        counts = [sum(deal.owns(number) for number in range(start, stop)) for deal in deals]
        assert max(counts) - min(counts) <= 1


def test_a_single_process_shares_and_merges_its_own_samples():
    samples = [trajectory(number=number, sample=sample) for number in range(2) for sample in range(2)]
    deal = Deal.of_run()
    assert deal.share(samples) == samples
    values = [np.array([index]) for index in range(4)]
    assert deal.merge(samples, values) == values
