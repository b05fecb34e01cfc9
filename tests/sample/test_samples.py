"""A sample's chunks join to its completion, and a stop string is never shown, however tokens cut it."""

import numpy as np
import pytest

from jaxtrain.sample.filters import TokenValues
from jaxtrain.sample.requests import Request, SamplingParams
from jaxtrain.sample.samples import Sample


class Letters:
    """A tokenizer of which an id is a piece of text."""

    pieces = ("a", "b", "ab", "bc", "c", "\ufffd", "é")

    def decode(self, ids, skip_special_tokens):
        return "".join(self.pieces[token] for token in ids)


def sample(tokenizer, **params):
    return Sample(4, 1, Request([1, 2], SamplingParams(**params)), 0, 0.0, tokenizer, (1, 2))


def values(ids):
    count = len(ids)
    supports, others = np.zeros((count, 0), np.int32), np.zeros((count, 0), np.int32)
    logps = -np.arange(count, dtype=np.float32)
    return TokenValues(np.array(ids, np.int32), logps, logps - 1, supports, others, np.zeros((count, 0), np.float32))


def advanced(one, *calls, reason="length"):
    """The chunks of calls that made these ids, the last one for `reason`."""
    return [
        one.advance(values(ids), reason if number == len(calls) else None, False, number, 0.5)
        for number, ids in enumerate(calls, 1)
    ]


@pytest.mark.parametrize("cuts", [(1, 2, 3), (2,), (4,), ()])
def test_chunks_join_to_the_completion(cuts):
    ids = np.array([0, 2, 3, 6, 1])
    chunks = advanced(sample(Letters()), *np.split(ids, cuts))
    completion = chunks[-1].completion
    assert [chunk.completion for chunk in chunks[:-1]] == [None] * len(cuts)
    assert completion.text == "".join(chunk.text for chunk in chunks) == "aabbcéb"
    assert np.concatenate([chunk.ids for chunk in chunks]).tolist() == completion.ids.tolist() == ids.tolist()
    lengths = np.diff([0, *cuts, 5])
    assert completion.versions.tolist() == np.repeat(np.arange(1, len(lengths) + 1), lengths).tolist()


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2), ()])
def test_a_stop_string_ends_the_sample_and_is_never_shown(cuts):
    ids = np.array([0, 1, 4, 0, 0])  # a b c a a
    one, chunks = sample(Letters(), stop=["bc"]), []
    for number, part in enumerate(np.split(ids, cuts)):
        chunks.append(one.advance(values(part), None, False, number, 0.5))
        if chunks[-1].completion is not None:
            break
    completion = chunks[-1].completion
    assert (completion.text, completion.finish_reason, completion.ids.tolist()) == ("a", "stop", [0, 1, 4])
    assert "".join(chunk.text for chunk in chunks) == "a"


def test_a_stop_string_ends_the_sample_only_after_min_tokens():
    ids = [1, 4, 0, 1, 4]  # b c a b c
    (chunk,) = advanced(sample(Letters(), stop=["bc"], min_tokens=2), ids)
    assert chunk.completion is not None
    assert (chunk.completion.text, chunk.completion.ids.tolist()) == ("bca", ids)


def test_half_a_character_waits_for_the_other_half():
    first, second = advanced(sample(Letters()), [0, 5], [1])
    assert first.text == "a" and second.text == "\ufffdb"  # it never became one


def test_a_sample_that_fails_before_its_first_token_has_no_values():
    chunk = sample(Letters()).fail("no", 1.0)
    completion = chunk.completion
    assert (completion.finish_reason, completion.error, completion.text) == ("failed", "no", "")
    assert [len(each) for each in (completion.ids, completion.logps, completion.versions)] == [0, 0, 0]
