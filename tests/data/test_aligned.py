import numpy as np
import pytest
from aligned_tokenizers import characters, pieces, sentencepiece

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.aligned import AlignedEncoder
from jaxtrain.data.alignment import Aligner, TokenBytes
from jaxtrain.data.formats import Encoder

ROW = {"prompt": "What is the capital of France?", "completion": "The capital is Paris \u2014 caf\u00e9 \U0001f600."}
CHAT = [("user", "1?"), ("assistant", "The capital of France is 1"), ("user", "2?"), ("assistant", "\u20ac2")]
CONVERSATION = {"messages": [{"role": role, "content": content} for role, content in CHAT]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return characters(tmp_path_factory.mktemp("t")), pieces()


def encoder(pair, **data):
    section = DataSection.model_validate({"train": SourceSection(path="x").model_dump(), "max_length": 200, **data})
    encoders = [Encoder.configured(tokenizer, section, vocab_size=10**6) for tokenizer in pair]
    return AlignedEncoder(*encoders, Aligner(*pair), section)


def groups_of(example):
    """[(the student's tokens, the teacher's tokens)] as the signals say."""
    found, signals = [], example.signals
    for start in np.flatnonzero(signals["group_place"] == 1):
        sides = []
        for places, at in (
            (signals["group_place"], start),
            (signals["teacher_place"], start + signals["teacher_shift"][start]),
        ):
            assert places[at] == 1
            stop = at + 1
            while stop < len(places) and places[stop] > 1:
                stop += 1
            np.testing.assert_array_equal(places[at:stop], np.arange(1, stop - at + 1))
            sides.append(range(at, stop))
        found.append(tuple(sides))
    return found


@pytest.mark.parametrize("row", [ROW, CONVERSATION], ids=["prompt", "conversation"])
@pytest.mark.parametrize("swapped", [False, True])
def test_the_signals_name_groups_that_write_the_same_text(pair, row, swapped):
    tokenizers = pair[::-1] if swapped else pair
    made = encoder(tokenizers)
    (example,), _ = made(row)
    alone = [Encoder(tokenizer)(row) for tokenizer in tokenizers]
    lengths = [len(each.input_ids) for each in alone]
    assert len(example.input_ids) == max(lengths)
    np.testing.assert_array_equal(example.input_ids[: lengths[0]], alone[0].input_ids)
    np.testing.assert_array_equal(example.loss_weights[: lengths[0]], alone[0].loss_weights)
    np.testing.assert_array_equal(example.signals["teacher_tokens"][: lengths[1]], alone[1].input_ids)
    assert not example.loss_weights[lengths[0] :].any() and not example.signals["teacher_place"][lengths[1] :].any()
    groups = groups_of(example)
    covered = [np.concatenate(side) for side in zip(*groups, strict=True)]
    for each, places in zip(alone, covered, strict=True):
        np.testing.assert_array_equal(places, np.flatnonzero(each.loss_weights))
    written = [TokenBytes(tokenizer) for tokenizer in tokenizers]
    for mine, other in groups:
        texts = [
            b"".join(table.of(each.input_ids[list(side)]))
            for table, each, side in zip(written, alone, (mine, other), strict=True)
        ]
        assert texts[0] == texts[1]  # both templates end a turn with the same text


def test_what_is_cut_is_in_no_group(pair):
    whole = encoder(pair)(ROW).items[0]
    length = int(np.flatnonzero(whole.signals["group_place"] == 2)[-1])  # within a group of the student's tokens
    made = encoder(pair, max_length=length)(ROW)
    (example,) = made.items
    assert made.events == ("truncated",) and len(example.input_ids) == length
    kept = groups_of(example)
    assert kept == [group for group in groups_of(whole) if max(side.stop for side in group) <= length]
    assert kept and example.signals["group_place"][-1] == 0 and example.loss_weights[-1] == 1
    assert encoder(pair, max_length=length, overlong="drop")(ROW) == ([], ("dropped",))
    with pytest.raises(ValueError, match=r"data.overlong=split would cut"):
        encoder(pair, overlong="split")


def test_a_beginning_that_one_tokenizer_adds_and_a_first_token_are_in_no_group(pair):
    spm = sentencepiece()
    (example,), _ = encoder((pair[0], spm), prompt_format="plain")({"text": "It is 12."})
    groups = groups_of(example)
    assert all(0 not in side for group in groups for side in group)
    assert spm.eos_token_id == example.signals["teacher_tokens"][groups[-1][1][0]]


def test_rows_that_cannot_be_aligned_are_refused(pair):
    with pytest.raises(ValueError, match="holds token ids"):
        encoder(pair)({"input_ids": [1, 2, 3]})
    with pytest.raises(
        ValueError, match=r"answer 1 of the row: the student's tokens write .*system.* differ from byte 12 on"
    ):
        encoder(pair, loss_on="all")(ROW)
    with pytest.raises(ValueError, match="under the teacher's tokenizer and chat template"):
        encoder((pair[0], sentencepiece("{{ raise_exception('no') }}")))(ROW)


def test_the_fingerprint_is_of_both(pair):
    prints = {encoder(each).fingerprint for each in (pair, pair[::-1], (pair[0], pair[0]))}
    assert len(prints | {encoder(pair, overlong="drop").fingerprint}) == 4
