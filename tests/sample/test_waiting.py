"""Which sample gets a free slot."""

from collections import Counter

import pytest

from jaxtrain.sample.requests import Request, SamplingParams
from jaxtrain.sample.samples import Sample
from jaxtrain.sample.waiting import Waiting


def order(fair, running=()):
    """Requests 0 and 1 have four samples each, and request 2 has one."""
    waiting, counts = Waiting(), Counter(running)
    waiting.fair = fair
    for number, samples in enumerate((4, 4, 1)):
        request = Request([1], SamplingParams(n=samples))
        waiting.add(Sample(number, index, request, 0, 0.0, None) for index in range(samples))
    taken = []
    while waiting:
        sample = waiting.pop(counts)
        counts[sample.number] += 1
        taken.append((sample.number, sample.index))
    return taken


def test_samples_are_taken_in_the_order_of_their_requests():
    assert order(False) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]


def test_fairly_the_request_with_the_fewest_running_samples_is_next():
    assert [number for number, _ in order(True)] == [0, 1, 2, 0, 1, 0, 1, 0, 1]
    assert [number for number, _ in order(True, running=[0, 0, 1])][:3] == [2, 1, 0]


@pytest.mark.parametrize("fair", [False, True])
def test_cancelled_samples_are_not_taken(fair):
    waiting = Waiting()
    waiting.fair = fair
    for number in range(2):
        waiting.add([Sample(number, 0, Request([1]), 0, 0.0, None)])
    waiting.cancel([0, 7])
    assert waiting.pop(Counter()).number == 1 and not waiting
