import chat_templates
import jax
import numpy as np
import pytest
import tiny
from trajectories import trajectory

from jaxtrain.config import ModelSection
from jaxtrain.config.rl_parts import RewardSection
from jaxtrain.data.turn_ends import turn_end_ids
from jaxtrain.nn.heads import SCALAR
from jaxtrain.nn.model import Model
from jaxtrain.rl.reward_models import Closing, RewardModel
from jaxtrain.rl.reward_pool import RewardPool
from jaxtrain.rl.scoring import RewardScorer
from jaxtrain.roles.declare import Declaration
from jaxtrain.roles.role import Role
from jaxtrain.types import Batch

SAMPLES = [trajectory(3, length, number=number, sample=0) for number, length in enumerate((4, 9, 1, 6))]


def reward_model(params=None, weight=1.0):
    model = tiny.model(num_layers=1, pattern=tiny.CONFIG.pattern[:1])
    model = Model(model.config, None, model.run, output=SCALAR)
    params = params or model.init(jax.random.key(0))
    section = ModelSection(path="unused")
    role = Role("judge", section, Declaration(model, {}, {}), 0, params)
    return RewardModel(role, weight, max_length=16), model, params


def test_it_reads_the_last_token_of_each_sample_whatever_it_is_packed_with():
    judge, model, params = reward_model()
    given = judge(SAMPLES)
    for value, t in zip(given, SAMPLES, strict=True):
        ids = np.concatenate([t.prompt.ids, t.completion_ids])[None]
        alone = Batch(ids, np.arange(ids.size)[None], np.ones_like(ids), np.ones(ids.shape, np.float32))
        expected = model.values(params, model.hidden(params, alone))[0, -1]
        np.testing.assert_allclose(value, expected, atol=2e-6)
    assert np.ptp(given) > 1e-3


@pytest.mark.parametrize("name", ["CHATML", "LLAMA3", "GEMMA"])
def test_a_sample_is_scored_where_texts_of_its_conversation_end(name):
    """However it ended: by the template's token, by another end token, or cut off."""
    tokenizer = chat_templates.tokenizer(getattr(chat_templates, name))
    asked = [{"role": "user", "content": "Why?"}]
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "So."}], tokenize=False)
    whole = tokenizer(whole, add_special_tokens=False)["input_ids"]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    begin = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    other = tokenizer.convert_tokens_to_ids("[INST]")
    close = Closing(tokenizer, {other, *turn_end_ids(tokenizer)}, plain=False)
    words = whole[begin : len(whole) - len(close.ids)]
    for end in ([close.ids[0]], [other], []):
        ids = np.array([*words, *end], np.int32)
        t = trajectory(begin, len(ids), completion_ids=ids)
        closed = close(t)
        assert closed.completion_ids.tolist() == whole[begin:] and closed.length == begin + len(whole[begin:])
        written = t._replace(prompt=t.prompt._replace(columns={"prompt": "Why?"}))
        assert Closing(tokenizer, {other}, plain=True)(written) is written


def test_its_part_is_weighted_and_one_that_is_not_finite_loses_its_sample():
    judge, _, params = reward_model(weight=3.0)
    no_functions: list[RewardSection] = []
    with RewardPool(no_functions) as pool:
        scorer = RewardScorer(no_functions, pool, models=[judge])
        scored = scorer([t._replace(rewards={}) for t in SAMPLES])
        np.testing.assert_allclose([t.reward for t in scored], 3 * judge(SAMPLES))
        assert scorer.metrics() == {"rewards/lost": 0.0}

        broken, _, _ = reward_model(jax.tree.map(lambda leaf: leaf * np.nan, params))
        scorer = RewardScorer(no_functions, pool, models=[broken])
        scored = scorer([t._replace(rewards={}) for t in SAMPLES])
        assert np.isnan([t.reward for t in scored]).all()
        assert scorer.metrics() == {"rewards/lost": 4.0, "rewards/judge/not_finite": 4.0}
