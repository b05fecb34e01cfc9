"""On-policy distillation from a teacher with another tokenizer."""

import numpy as np
import pytest
import tiny
from aligned_tokenizers import characters, pieces
from trajectories import trajectory

from jaxtrain.config import ModelSection
from jaxtrain.data.alignment import Aligner
from jaxtrain.rl.rollouts import pack_parts
from jaxtrain.rl.teachers import TeacherLogps
from jaxtrain.rl.translation import Translation
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
