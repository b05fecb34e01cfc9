"""A set of allowed sequences of token ids, which a sample is constrained to."""

from collections.abc import Sequence

import numpy as np


class Trie:
    """The id sequences that a sample may consist of, such as the semantic ids of a catalogue.

        trie = Trie([[11, 2, 5], [11, 2, 7], [12, 1]])
        Request(prompt, SamplingParams(trie=trie))

    A sample ends at the end of a sequence. So no sequence may be a prefix of another (add an end token to each
    instead): that raises ValueError, as an empty sequence or an empty list does.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]):
        children: list[dict[int, int]] = [{}]
        ends: set[int] = set()
        for number, sequence in enumerate(sequences):
            node = 0
            for token in sequence:
                if node in ends:
                    raise ValueError(f"trie: a shorter sequence is a prefix of sequence {number}, {list(sequence)}")
                if token not in children[node]:
                    children[node][int(token)] = len(children)
                    children.append({})
                node = children[node][int(token)]
            if not len(sequence) or children[node]:
                raise ValueError(f"trie: sequence {number}, {list(sequence)}, is empty or a prefix of a longer one")
            ends.add(node)
        if not ends:
            raise ValueError("trie: the list of sequences must not be empty")
        self.first = np.cumsum([0, *map(len, children)]).astype(np.int32)  # [nodes + 1], index of a node's first edge
        self.tokens = np.array([token for edges in children for token in edges], np.int32)  # [edges]
        self.targets = np.array([target for edges in children for target in edges.values()], np.int32)  # [edges]
        self.fanout = max(map(len, children))
        self.depth = max(map(len, sequences))
