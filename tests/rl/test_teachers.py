"""A teacher's log-probabilities are those of a forward pass of what it reads, however the samples are packed."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from trajectories import trajectory

from jaxtrain.config import MeshSection, ModelSection, TeacherSection
from jaxtrain.config.rl_parts import PlacementSection
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.rl.rollouts import pack_parts
from jaxtrain.rl.teachers import TeacherLogps, student_devices
from jaxtrain.roles.declare import Declaration
from jaxtrain.roles.role import Role
from jaxtrain.types import Batch

TEMPERATURE = 0.7
SAMPLES = [trajectory(3, length, number=n, sample=0) for n, length in enumerate((4, 9, 1, 6, 5))]
SAMPLES[1] = SAMPLES[1]._replace(left_out=True)
SAMPLES[3] = SAMPLES[3]._replace(supports=np.stack([SAMPLES[3].completion_ids, np.arange(6), np.arange(50, 56)], 1))


@pytest.fixture(scope="module")
def role():
    model = tiny.model(num_layers=1, pattern=tiny.CONFIG.pattern[:1])
    return Role("teacher", ModelSection(path="unused"), Declaration(model, {}, {}), 0, tiny.random_params(model))


def direct(of, prompt_ids, t):
    """[C] from the logits of one forward pass of prompt and completion alone, padded to one shape."""
    ids = np.concatenate([prompt_ids, t.completion_ids])
    ids, segment = (np.pad(each, (0, 40 - len(ids)))[None] for each in (ids, np.ones_like(ids)))
    alone = Batch(ids, np.arange(40)[None] * segment, segment, segment.astype(np.float32))
    head = of.head()
    logits = of.hidden(alone)[0] @ (head.weight.T if head.transposed else head.weight)
    logits = np.asarray(logits[len(prompt_ids) - 1 :, : head.vocab_size], np.float64) / TEMPERATURE
    logits = logits[: len(t.completion_ids)]
    if t.supports is not None:
        allowed = np.zeros(logits.shape, bool)
        np.put_along_axis(allowed, t.supports, True, 1)
        logits = np.where(allowed, logits, -np.inf)
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(jnp.array(logits))), t.completion_ids[:, None], 1)[:, 0]


def longer(prompt):
    """What a teacher reads beside the student's prompt; more than a student's row has room for."""
    return prompt._replace(ids=np.concatenate([np.arange(20 + prompt.number, dtype=np.int32), prompt.ids]))


@pytest.mark.parametrize("privileged", [None, longer], ids=["the student's prompts", "privileged"])
def test_they_are_those_of_a_forward_pass_of_what_the_teacher_reads(role, privileged):
    packed = pack_parts([SAMPLES[:3], SAMPLES[3:]], 16, 1)
    found = TeacherLogps(role, 16, privileged)(packed, SAMPLES, TEMPERATURE, [])
    for values, t in zip(found, SAMPLES, strict=True):
        assert values.shape == t.completion_ids.shape
        prompt = t.prompt if privileged is None else privileged(t.prompt)
        expected = 0 if t.left_out else direct(role, prompt.ids, t)
        np.testing.assert_allclose(values, expected, atol=1e-5)
    assert min(values.min() for values in found) < -1


def test_a_group_has_one_prompt_that_is_made_once(role):
    group, made = [trajectory(3, 2, sample=n) for n in range(3)], []

    def count(prompt):
        made.append(prompt.number)
        return prompt

    TeacherLogps(role, 16, count)(pack_parts([group], 16, 1), group, 1.0, [])
    assert made == [0]


def test_rows_that_its_devices_cannot_share_are_packed_again():
    sizes = []
    mesh = make_mesh(MeshSection(), jax.devices()[:4])
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=101), run=SimpleNamespace(mesh=mesh))

    def logps(batch, temperature):
        sizes.append(batch.tokens.shape)
        return batch.tokens.astype(np.float32)

    found = TeacherLogps(SimpleNamespace(model=model, logps=logps), 16)(pack_parts([SAMPLES], 16, 3), SAMPLES, 1.0, [])
    assert sizes == [(4, 16)]
    for values, t in zip(found, SAMPLES, strict=True):
        np.testing.assert_array_equal(values, t.completion_ids * (not t.left_out))


def test_a_token_that_it_does_not_know_is_named(role):
    unknown = [SAMPLES[0]._replace(completion_ids=np.array([3, 101, 5, 5], np.int32))]
    with pytest.raises(ValueError, match="sampled token 101, and the teacher's vocabulary has 101"):
        TeacherLogps(role, 16)(pack_parts([unknown], 16, 1), unknown, 1.0, [])


def test_the_student_has_the_devices_that_the_teacher_has_not():
    devices, colocated = jax.devices(), PlacementSection()
    assert student_devices(colocated, None) == student_devices(colocated, TeacherSection(path="x")) == devices
    assert student_devices(colocated, TeacherSection(path="x", devices=3)) == devices[:-3]
    disjoint = PlacementSection(kind="disjoint", rollout_devices=2)
    assert student_devices(disjoint, TeacherSection(path="x")) == devices[:-2]
