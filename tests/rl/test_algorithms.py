"""What a preset of `rl.algorithm` is, and what a config may change of it."""

from dataclasses import asdict, fields

import pytest

from jaxtrain.config import ConfigError, load_config, parse_config
from jaxtrain.objectives.distill import Distill
from jaxtrain.objectives.gold import GOLD
from jaxtrain.objectives.uld import ULD
from jaxtrain.rl.algorithms import ALGORITHMS

CORRECTION = {"level": "token", "mode": "truncate", "cap": 2.0, "floor": 0.0}
# What all presets have in common with GRPO, and where each differs.
GRPO = {
    "advantages": "group_normalised",
    "critic": False,
    "gamma": 1.0,
    "lam": 0.95,
    "bootstrap": False,
    "scale": "group",
    "max_refills": 0,
    "overlong_filter": False,
    "overlong_cache": 0.0,
    "teacher_coefficient": 0.0,
    "teacher_discount": 0.0,
    "objective": "GRPO",
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "dual_clip": None,
    "level": "token",
    "aggregation": "grpo",
    "beta": 0.0,
    "kl": "k3",
    "kl_in": "loss",
    "kl_bias_correction": True,
    "entropy_coefficient": 0.0,
    "entropy_target": None,
    "kl_target": None,
    "entropy_step": 0.0,
    "entropy_max": 1.0,
    "top_entropy": 1.0,
    "off_policy_threshold": None,
    "correction": CORRECTION,
    "max_completion_length": 512,
    "temperature": 1.0,
}
IN_THE_REWARD = {"kl": "k1", "kl_in": "reward"}
PRESETS = {
    "grpo": {},
    "dr_grpo": {"advantages": "group_centred", "objective": "DrGRPO", "aggregation": "dr_grpo"},
    "dapo": {
        "objective": "DAPO",
        "aggregation": "dapo",
        "epsilon_high": 0.28,
        "max_refills": 3,
        "overlong_filter": True,
        "overlong_cache": 0.2,
    },
    "gspo": {"objective": "GSPO", "level": "sequence", "epsilon_low": 0.0003, "epsilon_high": 0.0004},
    "rloo": {
        "advantages": "leave_one_out",
        "objective": "RLOO",
        "level": "product",
        "correction": CORRECTION | {"level": "sequence"},
        "beta": 0.05,
        **IN_THE_REWARD,
    },
    "reinforce++": {
        "advantages": "globally_normalised",
        "objective": "ReinforcePlusPlus",
        "aggregation": "dapo",
        "beta": 0.01,
        **IN_THE_REWARD,
    },
    "cispo": {"objective": "CISPO", "aggregation": "dapo", "epsilon_low": 1.0, "epsilon_high": 4.0},
    "sapo": {"objective": "SAPO", "tau_pos": 1.0, "tau_neg": 1.05},
    "vespo": {
        "objective": "VESPO",
        "aggregation": "dapo",
        "level": "product",
        "k_pos": 2.0,
        "lambda_pos": 3.0,
        "k_neg": 3.0,
        "lambda_neg": 2.0,
    },
    "gdpo": {"advantages": "separately_normalised"},
    "ppo": {
        "advantages": "gae",
        "critic": True,
        "objective": "PPO",
        "aggregation": "dapo",
        "beta": 0.05,
        **IN_THE_REWARD,
    },
    "on_policy_distillation": {
        "advantages": "group_centred",
        "objective": "ClippedPolicy",
        "aggregation": "dapo",
        "teacher_coefficient": 1.0,
    },
}
DIVERGENCES = ("gkd", "gold", "uld")


def config(algorithm="grpo", objective=None, sampling=None, **rl):
    name = algorithm["name"] if isinstance(algorithm, dict) and "name" in algorithm else algorithm
    teacher = (
        {"teacher": {"path": "teacher"}}
        if name in (*DIVERGENCES, "on_policy_distillation") or "teacher_coefficient" in algorithm
        else {}
    )
    rewards = {} if name in DIVERGENCES else {"rewards": [{"function": "exact_answer"}]}
    return parse_config(
        {
            "recipe": "rl",
            "model": {"path": "model"},
            "data": {"train": {"path": "train.jsonl"}},
            **teacher,
            "rl": {"algorithm": algorithm} | rewards | rl,
            "objective": objective or {},
            "sampling": sampling or {},
        }
    )


def resolved(algorithm):
    """All numbers of an algorithm and its objective."""
    own = {field.name: getattr(algorithm, field.name) for field in fields(algorithm) if field.name != "name"}
    objective = algorithm.objective
    own |= {"advantages": algorithm.advantages.__name__, "objective": type(objective).__name__}
    return own | asdict(objective)


def test_every_preset_is_in_the_table():
    assert {*PRESETS, *DIVERGENCES} == ALGORITHMS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_the_numbers_of_a_preset(name):
    expected = GRPO | PRESETS[name]
    if name in ("cispo", "sapo", "vespo"):  # which clip nothing
        del expected["dual_clip"]
    algorithm = config(name).algorithm
    assert (algorithm.name, resolved(algorithm)) == (name, expected)


def test_gkd_is_a_divergence_from_the_teacher_with_a_temperature_of_its_own():
    algorithm = config("gkd", {"kind": "reverse_kl", "temperature": 2.0}, {"temperature": 0.7}).algorithm
    assert algorithm.objective == Distill(kind="reverse_kl", temperature=2.0) and algorithm.needs_teacher
    assert config("gkd").algorithm.objective == Distill(kind="jsd", beta=0.5)
    assert not algorithm.needs_reference and not algorithm.kl_in_reward


def test_a_teacher_of_other_tokens_has_the_objectives_of_recipe_distill_without_its_cross_entropy():
    assert config("gold", {"beta": 0.2}).algorithm.objective == GOLD(beta=0.2)
    assert config("uld").algorithm.objective == ULD(ce_weight=0)
    assert config("uld").algorithm.aligns and not config("gkd").algorithm.aligns
    with pytest.raises(ConfigError, match=r"ce_weight=0.5 must be 0: the cross-entropy of the student's own"):
        config("gold", {"ce_weight": 0.5})
    with pytest.raises(ConfigError, match=r"Distill is not a subclass of jaxtrain.objectives:GOLD"):
        config("gold", {"name": "Distill"})


def test_a_teachers_term_can_be_added_to_any_algorithm_without_a_critic():
    algorithm = config({"name": "grpo", "teacher_coefficient": 0.1, "teacher_discount": 0.5}).algorithm
    assert algorithm.needs_teacher and (algorithm.teacher_coefficient, algorithm.teacher_discount) == (0.1, 0.5)
    assert not config("grpo").algorithm.needs_teacher


def test_the_quickstart_is_grpo_with_samples_of_48_tokens():
    loaded = load_config("configs/rl/quickstart.yaml")
    assert resolved(loaded.algorithm) == GRPO | {"max_completion_length": 48}
    assert loaded.rl is not None
    assert (loaded.rl.slots, loaded.rl.support, loaded.rl.prompts, loaded.rl.generations) == (128, 64, 16, 8)


@pytest.mark.parametrize("name", PRESETS)
def test_a_configs_own_numbers_replace_the_presets(name):
    given = {"name": name, "overlong_cache": 0.5}
    own = {"tau_pos": 0.3} if name == "sapo" else {"k_neg": 0.3} if name == "vespo" else {"epsilon_high": 0.3}
    changed = config(given, {"beta": 0.0} | own, {"temperature": 0.7}, max_completion_length=9).algorithm
    expected = {"overlong_cache": 0.5, "beta": 0.0, "temperature": 0.7, "max_completion_length": 9} | own
    assert resolved(changed) == resolved(config(name).algorithm) | expected
    assert not changed.needs_reference


def test_an_algorithm_of_the_users_own_is_named_by_its_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "import jax.numpy as jnp\n"
        "from jaxtrain.objectives.policy import PolicyObjective\n"
        "from jaxtrain.rl.advantages import group_centred\n"
        "from jaxtrain.rl.algorithms import Algorithm\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Unclipped(PolicyObjective):\n"
        "    power: float = 1.0\n"
        "    def surrogate(self, tokens):\n"
        "        return -jnp.exp(tokens.log_ratio) * tokens.advantages\n"
        "MINE = Algorithm(group_centred, Unclipped(beta=0.5))\n"
        "NOT_ONE = 3\n"
    )
    mine = config(f"{file}:MINE", {"power": 2.0}).algorithm
    assert type(mine.objective).__name__ == "Unclipped" and (mine.objective.beta, mine.objective.power) == (0.5, 2.0)
    with pytest.raises(ConfigError, match=r"unknown key objective\.powr; did you mean objective\.power\?"):
        config(f"{file}:MINE", {"powr": 3.0})
    with pytest.raises(ConfigError, match="not an Algorithm"):
        config(f"{file}:NOT_ONE")
    # An objective of one's own, with a preset's advantages.
    given = config("rloo", {"name": f"{file}:Unclipped", "beta": 0.1})
    assert (given.algorithm.advantages.__name__, given.objective.power, given.objective.kl) == (
        *("leave_one_out", 1.0),
        "k3",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "drgrpo"}, "did you mean dr_grpo"),
        ({"algorithm": {"max_refills": 2}}, "a mapping with a `name`"),
        ({"algorithm": {"name": "grpo", "max_refils": 2}}, "did you mean rl.algorithm.max_refills?"),
        ({"algorithm": {"name": "grpo", "max_refills": -2}}, r"rl.algorithm.max_refills: .* equal to 0 \(got -2\)"),
        ({"algorithm": {"name": "grpo", "objective": "PPO"}}, "fields are set in the section `objective`"),
        (
            {"algorithm": {"name": "grpo", "gamma": 0.9}},
            "gamma=0.9 has no effect: only gae and globally_normalised read",
        ),
        ({"algorithm": {"name": "rloo", "lam": 0.9}}, "only gae reads it"),
        ({"algorithm": {"name": "reinforce++", "lam": 0.9}}, "only gae reads it"),
        ({"algorithm": {"name": "grpo", "bootstrap": True}}, "bootstrap=True has no effect: only gae reads it"),
        ({"algorithm": {"name": "rloo", "scale": "batch"}}, "only group_normalised reads it"),
        ({"algorithm": "gdpo", "objective": {"beta": 0.1, "kl_in": "reward"}}, "GDPO normalises each reward"),
        ({"algorithm": "sapo", "objective": {"epsilon_low": 0.1}}, "SAPO weighs the ratio smoothly and has no bounds"),
        ({"algorithm": "vespo", "objective": {"level": "token"}}, "which is level=product"),
        ({"objective": {"correction": {"floor": 3.0}}}, r"floor=3\.0 must not be more than cap=2\.0"),
        ({"critic": {"learning_rate": 1e-4}}, "grpo has none"),
        ({"algorithm": "cispo", "objective": {"dual_clip": 3.0}}, r"unknown key objective\.dual_clip"),
        ({"objective": {"kl": "k2"}}, "objective: kl=k2 has no effect: beta is 0"),
        ({"objective": {"kl_in": "reward"}}, "beta is 0"),
        ({"algorithm": "rloo", "objective": {"beta": 0.0, "kl": "k3"}}, "beta is 0"),
        ({"algorithm": "rloo", "objective": {"kl_bias_correction": False}}, "the KL is not in the loss"),
        (
            {"objective": {"beta": 0.1, "kl": "k1", "kl_bias_correction": False}},
            "kl=k1 in the loss has an expected gradient of 0",
        ),
        ({"objective": {"beta": 0.1, "kl": "k2"}}, "kl=k2 needs kl_bias_correction=false"),
        ({"objective": {"entropy_step": 0.1}}, "entropy_step=0.1 has no effect: there is no entropy_target"),
        ({"objective": {"beta": 0.1, "kl_target": 0.1}}, "kl_target=0.1 has no effect: kl_in is loss"),
        ({"objective": {"entropy_target": 0.3}}, "needs an entropy_coefficient"),
        ({"objective": {"dual_clip": 1.0}}, "dual_clip=1.0 must be more than 1"),
        ({"objective": {"beta": -1}}, r"objective.beta: .* equal to 0 \(got -1\)"),
        ({"objective": {"correction": {"cap": 0}}}, r"objective.correction.cap: .* greater than 0 \(got 0\)"),
        ({"objective": {"temperature": 0.5}}, "objective.temperature: sampling.temperature sets it"),
        ({"objective": {"max_completion_length": 5}}, "objective.max_completion_length: rl.max_completion_length sets"),
        (
            {"objective": {"name": "SFT"}},
            "is not a subclass of jaxtrain.objectives:PolicyObjective, which recipe rl needs",
        ),
        ({"objective": {"name": "PolicyObjective"}}, "none abstract"),
        ({"objective": {"name": "Logp"}}, "not a dataclass with the members"),
        ({"objective": {"name": "GRPPO"}}, "did you mean GRPO?"),
        ({"sampling": {"top_k": 100, "top_p": 0.9}}, "sampling.top_k=100 is more than rl.support=64"),
        ({"sampling": {"min_tokens": 600}}, "sampling.min_tokens=600 is more than rl.max_completion_length=512"),
        ({"sampling": {"stop": ""}}, "sampling.stop"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature=0 is greedy"),
        ({"placement": {"staleness": 1}, "objective": {"correction": None}}, "staleness=1 needs objective.correction"),
        ({"algorithm": {"name": "grpo", "teacher_discount": 0.5}}, "has no effect: teacher_coefficient is 0"),
        ({"algorithm": {"name": "ppo", "teacher_coefficient": 0.5}}, "critic: its returns do not include the teacher"),
        ({"algorithm": {"name": "gkd", "teacher_coefficient": 0.5}}, "a divergence, which has no advantages"),
        ({"algorithm": {"name": "gkd", "gamma": 0.5}}, "a divergence, which has no advantages"),
        ({"algorithm": "gkd", "objective": {"ce_weight": 0.1}}, "ce_weight=0.1 must be 0"),
        ({"algorithm": "gkd", "objective": {"name": "GRPO"}}, "is not a subclass of jaxtrain.objectives:Distill"),
        ({"objective": {"name": "Distill"}}, "is not a subclass of jaxtrain.objectives:PolicyObjective"),
    ],
)
def test_what_is_wrong_or_has_no_effect_is_refused_by_its_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_numbers_with_an_effect_are_not():
    ppo = config(
        {"name": "ppo", "gamma": 0.9, "lam": 0.8}, {"dual_clip": 3.0}, critic={"learning_rate": 1e-4}
    ).algorithm
    assert (ppo.gamma, ppo.lam, ppo.objective.dual_clip, ppo.critic) == (0.9, 0.8, 3.0, True)
    assert config(objective={"beta": 0.1, "kl": "k1", "kl_bias_correction": True}).objective.kl_bias_correction
    assert config("rloo", {"kl_in": "loss"}).objective.kl_in == "loss"
    assert config("rloo", {"kl_in": "loss", "kl": "k2", "kl_bias_correction": False}).objective.kl == "k2"
    assert config({"name": "reinforce++", "gamma": 0.9}).algorithm.gamma == 0.9
    assert config({"name": "grpo", "scale": "batch"}).algorithm.scale == "batch"
    bonus = config(objective={"entropy_coefficient": 0.01, "entropy_target": 0.3}).objective
    assert (bonus.entropy_coefficient, bonus.entropy_target) == (0.01, 0.3)
    assert config(sampling={"stop": ["###"], "min_tokens": 3}).sampling.stop == ("###",)
    moving = {"entropy_coefficient": 0.01, "entropy_target": 0.3, "entropy_step": 0.005, "entropy_max": 0.1}
    assert config("rloo", moving | {"kl_target": 0.1}).objective.kl_target == 0.1
    # The preset's own value may stand there, although nothing reads it.
    assert config({"name": "grpo", "gamma": 1.0}, {"kl": "k3"}).objective.kl == "k3"
    assert config(objective={"correction": None}).objective.correction is None
