"""`EngineSampler`: what is drawn depends on the seed, the prompt's number, the sample and the weights alone."""

import threading
from dataclasses import replace

import pytest
import samplers
import tiny

from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain.config.rl_parts import EnvironmentSection
from jaxtrain.rl.rollouts import Prompt
from jaxtrain.rl.sampler import EngineSampler
from jaxtrain.rl.sync import WeightSync, rollout_model
from jaxtrain.train.preemption import Interrupted


@pytest.fixture(scope="module")
def made():
    trainer = tiny.model(**samplers.SIZES)
    params = tiny.random_params(trainer)
    spec = samplers.spec(rollout_model(trainer, None))
    sync = WeightSync(trainer, spec.model)
    return spec, sync, params


def sampler(made) -> EngineSampler:
    spec, sync, params = made
    return spec.build(sync(params).params, 0, sync)


def test_a_prompts_samples_are_the_same_in_any_company(made):
    one = sampler(made)
    expected = one.sample(samplers.PROMPTS, 5)
    samplers.same(one.sample(samplers.PROMPTS[::-1], 5)[::-1], expected)
    samplers.same(one.sample(samplers.PROMPTS[2:], 3), [expected[2][:3]])
    assert len({tuple(t.completion_ids) for t in expected[0]}) > 1


def test_a_stream_begins_prompts_while_others_are_sampled(made):
    one = sampler(made)
    one._engine.limits = one._engine.limits._replace(steps=1)  # a device call a token
    expected = {(t.prompt.number, t.sample): t for group in one.sample(samplers.PROMPTS, 2) for t in group}
    seen = []

    def feed():
        yield samplers.PROMPTS[:1]
        yield ()
        seen.append(one._engine.busy)
        yield samplers.PROMPTS[1:]

    found = {(t.prompt.number, t.sample): t for t in one.stream(feed(), 2)}
    assert seen == [True] and found.keys() == expected.keys()
    samplers.same([[found[key] for key in expected]], [list(expected.values())])


def test_a_waiting_call_is_announced_to_the_stream_and_is_next(made):
    one, other = sampler(made), []
    thread = threading.Thread(target=lambda: other.append(one.sample(samplers.PROMPTS[1:], 1)))

    def feed():
        yield samplers.PROMPTS[:1]
        assert not one.wanted()
        thread.start()
        while not one.wanted():
            yield ()

    assert len(list(one.stream(feed(), 2))) == 2
    assert len(list(one.stream(iter([samplers.PROMPTS[:1]]), 1))) == 1 and other
    thread.join()


def test_weights_set_from_another_thread_are_taken_between_device_calls(made):
    one = sampler(made)
    engine, params = one._engine, made[2]
    engine.limits = engine.limits._replace(steps=1)  # a device call a token
    calls, step = [], engine.step

    def step_and_set():
        if len(calls) == 2:
            thread = threading.Thread(target=one.set_params, args=(params, 9))
            thread.start()
            thread.join()
        calls.append(engine.version)
        return step()

    engine.step = step_and_set
    (group,) = one.sample(samplers.PROMPTS[:1], 1)
    versions = group[0].versions.tolist()
    assert versions == sorted(versions) and set(versions) == {0, 9}
    samplers.same([[group[0]]], sampler(made).sample(samplers.PROMPTS[:1], 1))  # the weights are equal


def test_conversations_are_the_same_in_turns_and_each_for_itself(tmp_path):
    write_byte_tokenizer(tmp_path)
    trainer = tiny.model(**samplers.SIZES, vocab_size=259)
    params = tiny.random_params(trainer)
    spec = samplers.spec(rollout_model(trainer, None))
    environment = EnvironmentSection(factory="GuessingGame", max_turns=3)
    stops = replace(spec.params, stop_ids=tuple(range(65, 73)), max_tokens=32)
    spec = replace(spec, tokenizer=load_tokenizer(tmp_path), environment=environment, params=stops, max_length=256)
    prompts = [Prompt(number, samplers.PROMPTS[0].ids, {"secret": number}) for number in range(3)]
    sync = WeightSync(trainer, spec.model)
    made = [replace(spec, in_turns=each).build(sync(params).params, 0, sync) for each in (True, False)]
    in_turns, alone = (sampler.sample(prompts, 3) for sampler in made)
    samplers.same(alone, in_turns)
    assert any(t.info["turns"] > 1 for group in alone for t in group)


def test_an_interrupted_sampler_gives_up(made):
    one = sampler(made)
    one.interrupt()
    with pytest.raises(Interrupted):
        one.sample(samplers.PROMPTS, 2)
