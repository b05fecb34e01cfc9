import numpy as np
import pytest
from aligned_tokenizers import TEXTS, characters, pieces, sentencepiece
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from jaxtrain.data.alignment import Aligner, Groups, TokenBytes, align_texts, group_log_ratios
from jaxtrain.types import Example


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {"pieces": pieces(), "characters": characters(tmp_path_factory.mktemp("t")), "spm": sentencepiece()}


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["pieces", "characters", "spm"])
def test_the_tokens_of_a_text_write_its_bytes(tokenizers, name, text):
    written = b"".join(TokenBytes(tokenizers[name]).of(ids_of(tokenizers[name], text)))
    assert written == (b" " if name == "spm" else b"") + text.encode()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    ("one", "other"), [("pieces", "characters"), ("spm", "pieces"), ("characters", "spm"), ("pieces", "pieces")]
)
def test_groups_are_the_smallest_with_equal_texts(tokenizers, one, other, text):
    pair = tokenizers[one], tokenizers[other]
    ids = [ids_of(tokenizer, text) for tokenizer in pair]
    written = [TokenBytes(tokenizer).of(of) for tokenizer, of in zip(pair, ids, strict=True)]
    groups = Aligner(*pair).ids(*ids)
    texts = []
    for (start, stop), (first, last) in zip(groups.student, groups.teacher, strict=True):
        mine, theirs = b"".join(written[0][start:stop]), b"".join(written[1][first:last])
        assert mine.strip() == theirs.strip() and (texts == [] or mine == theirs)  # a space before the first one
        ends = [
            np.cumsum([len(token) for token in run])[:-1] for run in (written[0][start:stop], written[1][first:last])
        ]
        assert not set(ends[0]) & set(ends[1] + len(mine) - len(theirs))
        texts.append(mine)
    assert b"".join(texts).strip() == text.encode().strip()
    for side, of in zip(groups, ids, strict=True):
        assert np.all(side[1:, 0] == side[:-1, 1]) and side[-1, 1] == len(of)
    if one == other:
        np.testing.assert_array_equal(groups.student[:, 1] - groups.student[:, 0], 1)


def test_the_end_of_a_turn_goes_with_that_of_the_other(tokenizers):
    aligner = Aligner(tokenizers["pieces"], tokenizers["spm"])
    ends = [tokenizers["pieces"].convert_tokens_to_ids("<|eot_id|>"), tokenizers["spm"].eos_token_id]
    empty = aligner.ids(ends[:1], ends[1:])
    np.testing.assert_array_equal(empty, [[[0, 1]], [[0, 1]]])
    answers = [ids_of(tokenizers[name], "It is 12") for name in ("pieces", "spm")]
    whole = aligner.ids([*answers[0], ends[0]], [1, *answers[1], ends[1]])  # <s> before the teacher's
    assert [side[-1].tolist() for side in whole] == [
        [len(answers[0]), len(answers[0]) + 1],
        [len(answers[1]) + 1, len(answers[1]) + 2],
    ]
    np.testing.assert_array_equal(aligner.ids(answers[0], [*answers[1], ends[1]]).student, whole.student[:-1])
    assert len(aligner.ids([], []).student) == 0


def test_sampled_ids_that_no_tokenizer_would_choose(tokenizers):
    pair = tokenizers["pieces"], tokenizers["characters"]
    ids = [number for character in "Paris" for number in ids_of(pair[0], character)]
    assert len(ids) > len(ids_of(pair[0], "Paris"))
    groups = Aligner(*pair).ids(ids, ids_of(pair[1], "Paris"))
    np.testing.assert_array_equal(groups.student, groups.teacher)
    assert len(groups.student) == len("Paris")


def test_white_space_that_only_one_has_is_in_no_group():
    groups = align_texts([b"\n", b"4", b"2", b" "], [b"42"])
    np.testing.assert_array_equal(groups, [[[1, 3]], [[0, 1]]])
    kept = align_texts([b"\n", b"4"], [b"\n", b"4"])
    np.testing.assert_array_equal(kept.student, [[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="'forty two' and the teacher's '42', which differ from byte 0 on"):
        align_texts([b"forty two"], [b"42"])


def test_answers_of_a_conversation_are_aligned_one_by_one(tokenizers):
    names = ("pieces", "characters")
    answers = [[ids_of(tokenizers[name], text) for text in ("It is 12", "Paris")] for name in names]
    examples = []
    for name, (first, second) in zip(names, answers, strict=True):
        eos = tokenizers[name].eos_token_id
        between = ids_of(tokenizers[name], "And " * (2 if name == "characters" else 1))
        ids = [*between, *first, eos, *between, *second, eos]
        weights = np.concatenate(
            [np.zeros(len(between)), np.ones(len(first) + 1), np.zeros(len(between)), np.ones(len(second) + 1)]
        )
        examples.append(Example(np.array(ids, np.int32), weights.astype(np.float32)))
    aligner = Aligner(*(tokenizers[name] for name in names))
    groups = aligner.examples(*examples)
    for side, example in zip(groups, examples, strict=True):
        covered = np.concatenate([np.arange(start, stop) for start, stop in side])
        np.testing.assert_array_equal(covered, np.flatnonzero(example.loss_weights))
    cut = groups.within(len(examples[0].input_ids) - 1)
    assert len(cut.student) < len(groups.student) and cut.student.max() < len(examples[0].input_ids)
    with pytest.raises(ValueError, match="2 runs of tokens are trained under the student's chat template, and 1 "):
        aligner.examples(examples[0], examples[1]._replace(loss_weights=np.ones(len(examples[1].input_ids))))


def test_the_first_token_of_an_example_is_in_no_group():
    groups = Groups(np.array([[0, 1], [1, 2]]), np.array([[0, 2], [2, 3]]))
    np.testing.assert_array_equal(groups.within(9).student, [[1, 2]])


def test_a_tokenizer_of_unknown_bytes_is_refused():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    other = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(
        ValueError, match="the teacher's tokenizer cannot be aligned: its decoder, WordPiece, is neither"
    ):
        Aligner(pieces(), other)


def test_log_ratios_of_groups_are_of_their_texts():
    groups = Groups(np.array([[1, 2], [2, 4]]), np.array([[0, 3], [3, 4]]))
    student, teacher = np.array([9, -1, -2, -3, 9.0]), np.array([-0.5, -0.25, -0.125, -4.0])
    np.testing.assert_allclose(group_log_ratios(groups, student, teacher), [0, 0.125, 0.5, 0.5, 0])
    alone = Groups(*[np.stack([np.arange(4), np.arange(1, 5)], 1)] * 2)
    np.testing.assert_allclose(group_log_ratios(alone, student[:4], teacher), teacher - student[:4])
