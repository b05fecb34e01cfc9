"""Tries: every sequence can be walked to its end, whichever tries lie beside it."""

import numpy as np
import pytest

from jaxtrain.sample.constraints import Trie, advance, join_tries

CATALOGUES = [[[11, 2, 5], [11, 2, 7], [12, 1]], [[3]], [[n, n + 1, n + 2, n + 3] for n in range(9)]]


@pytest.mark.parametrize("number", range(len(CATALOGUES)))
def test_a_sequence_ends_where_it_ends_and_nowhere_else(number):
    tries, roots = join_tries([Trie(catalogue) for catalogue in CATALOGUES])
    for sequence in CATALOGUES[number]:
        node = np.array([roots[number], 0], np.int32)  # the second slot is free
        for place, token in enumerate(sequence, 1):
            node, ended = advance(tries, node, np.array([token, token], np.int32))
            assert ended.tolist() == [place == len(sequence), False]
            assert node[1] == 0


def test_another_trie_of_like_size_keeps_the_shapes():
    catalogues = [range(5), range(10, 14)], [range(7), range(10, 16)]
    one, other = ([leaf.shape for leaf in join_tries([Trie(each)])[0]] for each in catalogues)
    assert one == other
