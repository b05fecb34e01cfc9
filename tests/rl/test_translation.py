"""On-policy distillation from a teacher with another tokenizer."""

import numpy as np
import pytest
import tiny
from aligned_tokenizers import characters, pieces
from trajectories import trajectory

from jaxtrain.config import DataSection, ModelSection, SourceSection
from jaxtrain.data.aligned import AlignedEncoder
from jaxtrain.data.alignment import Aligner
from jaxtrain.data.formats import Encoder
from jaxtrain.rl.rollouts import Prompt, pack_parts
from jaxtrain.rl.teachers import TeacherLogps
from jaxtrain.rl.translation import AlignedSamples, TeacherPrompts, Translation
from jaxtrain.roles.declare import Declaration
from jaxtrain.roles.role import Role
from jaxtrain.types import Batch

TEXTS = ["The capital is Paris.", "caf\u00e9 \u20ac12 \U0001f600", "x", ""]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return characters(tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module")
def teacher():
    tokenizer = pieces()
    model = tiny.model(num_layers=1, pattern=tiny.CONFIG.pattern[:1], vocab_size=len(tokenizer))
    role = Role("teacher", ModelSection(path="unused"), Declaration(model, {}, {}), 0, tiny.random_params(model))
    role.__dict__["tokenizer"] = tokenizer
    return role


def sample(tokenizer, text, number, ended=True, more=()):
    ids = [*tokenizer(text)["input_ids"], *more, *[tokenizer.eos_token_id] * ended]
    return trajectory(3, len(ids), number=number)._replace(completion_ids=np.array(ids, np.int32))


def read(prompt):
    """Another prompt than the student's, and a longer one."""
    return prompt._replace(ids=np.arange(5, 12, dtype=np.int32))


def test_the_sum_over_a_sample_is_the_log_ratio_of_its_text(student, teacher):
    samples = [sample(student, text, number) for number, text in enumerate(TEXTS)]
    samples[2] = samples[2]._replace(left_out=True)
    own = [-np.random.default_rng(n).random(len(t.completion_ids)).astype(np.float32) for n, t in enumerate(samples)]
    logps = TeacherLogps(teacher, 64, read, Translation(Aligner(student, teacher.tokenizer), teacher))
    found = logps(pack_parts([samples[:2], samples[2:]], 64, 1), samples, 0.7, own)
    assert logps.metrics == {"teacher_aligned": 1}
    for text, t, mine, values in zip(TEXTS, samples, own, found, strict=True):
        assert values.shape == mine.shape
        if t.left_out:
            continue
        ids = np.array([*read(t.prompt).ids, *teacher.tokenizer(text)["input_ids"], _end(teacher)], np.int32)[None]
        weights = np.zeros(ids.shape, np.float32)
        weights[0, 7:] = 1
        alone = Batch(ids, np.arange(ids.size)[None], np.ones_like(ids), weights)
        np.testing.assert_allclose(values.sum(), np.asarray(teacher.logps(alone, 0.7)).sum(), rtol=1e-5, atol=1e-4)


def _end(teacher):
    return teacher.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_equal_tokenizers_give_the_teachers_own(teacher):
    samples = [sample(teacher.tokenizer, text, number) for number, text in enumerate(TEXTS)]
    packed = pack_parts([samples], 64, 1)
    own = [np.full(len(t.completion_ids), -0.5, np.float32) for t in samples]
    expected = TeacherLogps(teacher, 64, read)(packed, samples, 1.0, own)
    translation = Translation(Aligner(teacher.tokenizer, teacher.tokenizer), teacher)
    found = TeacherLogps(teacher, 64, read, translation)(packed, samples, 1.0, own)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_examples_of_samples_are_those_of_rows_with_their_texts(student, teacher):
    """Recipe distill's encoder makes them of the rows; a cut goes through the longer of two."""
    data = DataSection(train=[SourceSection(path="unused")], max_length=40, prompt_format="plain")
    encode = Encoder.configured(student, data, vocab_size=len(student))
    theirs = Encoder.configured(teacher.tokenizer, data, vocab_size=len(teacher.tokenizer))
    aligner = Aligner(student, teacher.tokenizer)
    rows = [{"prompt": "Where is it?", "completion": text} for text in ("Paris.", "caf\u00e9 \u20ac12")]
    expected = [AlignedEncoder(encode, theirs, aligner, data)(row).items[0] for row in rows]
    samples = []
    for number, (row, example) in enumerate(zip(rows, expected, strict=True)):
        prompt = Prompt(number, *encode.question(row))
        completion = encode(row).input_ids[len(prompt.ids) :]
        t = trajectory(3, len(completion), number=number)
        samples.append(t._replace(prompt=prompt, completion_ids=completion))
        assert example.signals["group_place"].max() > 0
    read = TeacherPrompts(theirs)
    found = AlignedSamples(Translation(aligner, teacher), read, data.max_length)(samples)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.loss_weights, other.loss_weights)
        assert one.signals.keys() == other.signals.keys()
        for name, values in one.signals.items():
            np.testing.assert_array_equal(values, other.signals[name], err_msg=name)
    (packed,) = pack_parts([samples], 80, 2, AlignedSamples(Translation(aligner, teacher), read, 80))
    for t, ids, places in zip(
        samples, packed.gather(packed.batch.tokens), packed.gather(packed.batch.signals["group_place"]), strict=True
    ):
        np.testing.assert_array_equal(ids, t.completion_ids)
        assert places[-1] > 0


def test_bytes_that_are_no_text_are_in_no_group(student, teacher):
    translate = Translation(Aligner(student, teacher.tokenizer), teacher)
    half = student("\u20ac")["input_ids"][:2]
    cut = translate(sample(student, "It is", 0, ended=False, more=half))
    whole = translate(sample(student, "It is", 0, ended=False))
    np.testing.assert_array_equal(cut.groups.student, whole.groups.student)
    np.testing.assert_array_equal(cut.trajectory.completion_ids, whole.trajectory.completion_ids)
    assert whole.groups.student[-1, 1] == len("It is") and whole.trajectory.completion_ids[-1] != _end(teacher)
    within = translate(sample(student, "It is", 0, more=[*half, *student(" 2")["input_ids"]]))
    np.testing.assert_array_equal(within.groups.student, whole.groups.student)
