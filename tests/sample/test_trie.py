import pytest

from jaxtrain.sample.trie import Trie


def test_the_edges_of_a_node_are_neighbours():
    trie = Trie([[11, 2, 5], [11, 2, 7], [12, 1]])
    paths = []

    def walk(node, path):
        edges = range(trie.first[node], trie.first[node + 1])
        if not edges:
            paths.append(path)
        for edge in edges:
            walk(trie.targets[edge], [*path, int(trie.tokens[edge])])

    walk(0, [])
    assert sorted(paths) == [[11, 2, 5], [11, 2, 7], [12, 1]]
    assert trie.fanout == 2 and trie.depth == 3


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "must not be empty"),
        ([[1], []], "sequence 1"),
        ([[1], [1, 2]], "is a prefix of"),
        ([[1, 2], [1]], "a prefix of a longer"),
    ],
)
def test_a_trie_of_sequences_that_do_not_end_is_refused(sequences, message):
    with pytest.raises(ValueError, match=message):
        Trie(sequences)
