"""Sections that are the fields of a dataclass: objectives and sampling parameters."""

from dataclasses import fields

import pytest
import yaml

from jaxtrain.config import ConfigError, config_tree, dump_config, load_config, parse_config
from jaxtrain.config.changes import check_keys, differences
from jaxtrain.config.dataclass_sections import SAMPLING
from jaxtrain.objectives import SFT
from jaxtrain.objectives.importance import Correction
from jaxtrain.sample.requests import SamplingParams

FOCAL = '''
from dataclasses import dataclass

import jax.numpy as jnp

from jaxtrain.objectives import Logp


@dataclass(frozen=True)
class Focal:
    """-(1 - p)^gamma log p."""

    gamma: float
    scales: tuple[float, ...] = (1.0,)

    needs = (Logp(),)
    signals = ()
    separable = True

    def __call__(self, scores, batch, norm):
        loss = -((1 - jnp.exp(scores.logp)) ** self.gamma) * scores.logp * batch.loss_weights
        return sum(self.scales) * jnp.sum(loss) / jnp.maximum(norm.tokens, 1), {}


class NoDataclass:
    pass
'''


def sft(**sections):
    return {"recipe": "sft", "model": {"path": "model"}, "data": {"train": {"path": "train.jsonl"}}} | sections


def rl(rl=None, **sections):
    return sft(recipe="rl", rl={"rewards": [{"function": "exact_answer"}]} | (rl or {})) | sections


def faults(tree):
    with pytest.raises(ConfigError) as error:
        parse_config(tree)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "focal.py").write_text(FOCAL)
    return tmp_path / "focal.py"


def test_without_a_section_sft_is_trained():
    assert parse_config(sft()).objective == SFT()


def test_a_class_of_the_users_own_has_its_fields_as_keys(file):
    objective = parse_config(sft(objective={"name": f"{file}:Focal", "gamma": 2, "scales": [0.5, 1]})).objective
    assert (type(objective).__name__, objective.gamma, objective.scales) == ("Focal", 2, (0.5, 1))
    given = parse_config(sft(objective={"name": type(objective), "gamma": 3.0}))  # by a program
    assert given.objective == type(objective)(3.0)
    assert config_tree(given)["objective"] == {"name": f"{file}:Focal", "gamma": 3.0, "scales": [1.0]}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, ["objective.gamma is missing"]),
        ({"gama": 2.0}, ["objective.gamma is missing", "unknown key objective.gama; did you mean objective.gamma?"]),
        ({"gamma": "2"}, ["objective.gamma: Input should be a valid number (got '2'): write 2 without quotes"]),
        ({"gamma": 1, "scales": 2}, ["objective.scales: Input should be a valid tuple (got 2)"]),
    ],
)
def test_what_is_wrong_with_its_fields_is_said_by_the_full_key(file, section, expected):
    assert faults(sft(objective={"name": f"{file}:Focal"} | section)) == expected


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"name": "{file}:Fokal"}, "did you mean Focal?"),
        ({"name": "{file}:NoDataclass"}, ":NoDataclass is not a dataclass with the members needs, signals"),
        ({"name": "nowhere.py:Focal"}, "objective.name: file nowhere.py was not found"),
        (
            {"name": "GRPO"},
            "objective.name=GRPO needs the signals advantages, sampler_logps, which the rows of recipe sft do not have",
        ),
        (3, "objective: should be the name of a class, or a mapping"),
        ({"beta": 1.0}, "unknown key objective.beta; known here: name"),
        ({3: 1.0}, "unknown key objective.3; known here: name"),
    ],
)
def test_what_cannot_be_an_objective_of_sft_is_said(file, section, expected):
    if isinstance(section, dict) and "name" in section:
        section = {"name": section["name"].format(file=file)}
    assert expected in faults(sft(objective=section))[0]


def test_all_faults_are_reported_at_once_also_beside_those_of_the_section_of_the_preset():
    tree = rl(
        {"promts": 1, "algorithm": {"name": "rloo", "lam": 2}},
        objective={"betta": 1, "epsilon_low": -1, "correction": {"cap": -1, "capp": 1}},
        sampling={"top_p": 2, "top_kk": 1, "n": 2},
        train={"steps": 0},
    )
    tree["rl"]["algorithm"] = "rloo"
    assert faults(tree) == [
        "train.steps: Input should be greater than 0 (got 0)",
        "unknown key rl.promts; did you mean rl.prompts?",
        "sampling.top_p: Input should be less than or equal to 1 (got 2)",
        "unknown key sampling.top_kk; did you mean sampling.top_k?",
        "sampling.n: rl.generations sets it (got 2)",
        "objective.epsilon_low: Input should be greater than or equal to 0 (got -1)",
        "objective.correction.cap: Input should be greater than 0 (got -1)",
        "unknown key objective.correction.capp; did you mean objective.correction.cap?",
        "unknown key objective.betta; did you mean objective.beta?",
    ]


OBJECTIVE = (
    *("aggregation", "beta", "dual_clip", "entropy_coefficient", "entropy_target", "epsilon_high", "epsilon_low"),
    *("kl", "kl_bias_correction", "kl_in", "correction"),
)
MOVED = {
    **{name: f"objective.{name}" for name in OBJECTIVE},
    **{name: f"rl.algorithm.{name}" for name in ("gamma", "lam", "max_refills", "overlong_cache", "overlong_filter")},
    **{f"sampling.{name}": f"sampling.{name}" for name in ("temperature", "top_k", "top_p", "min_p")},
    **{f"sampling.{name}": f"rl.{name}" for name in ("slots", "support")},
}


@pytest.mark.parametrize("name", MOVED)
def test_a_key_that_has_moved_is_unknown_and_its_new_place_is_named(name):
    section, _, inner = name.rpartition(".")
    given = {section: {inner: 1}} if section else {inner: 1}
    assert faults(rl(given)) == [f"unknown key rl.{name}; did you mean {MOVED[name]}?"]


@pytest.mark.parametrize("field", [field.name for field in fields(SamplingParams)])
def test_a_sampling_parameter_is_a_key_or_is_refused_with_what_sets_it(field):
    taken = {"temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.5, "stop": ("###",), "min_tokens": 3}
    value = taken.get(field)
    if value is None:
        assert faults(rl(sampling={field: 1})) == [f"sampling.{field}: {SAMPLING.set_elsewhere[field]} (got 1)"]
    else:
        assert getattr(parse_config(rl(sampling={field: value})).sampling, field) == value


def test_sampling_is_for_recipe_rl():
    assert faults(sft(sampling={})) == ["sampling: recipe sft draws no samples that it trains on; leave it out"]


@pytest.mark.parametrize("recipe", ["sft", "a class of the user's own", "rl", "rl with another class"])
def test_the_printed_config_holds_every_field_and_reads_back_equal(recipe, file, tmp_path):
    config = parse_config(
        {
            "sft": sft(),
            "a class of the user's own": sft(objective={"name": f"{file}:Focal", "gamma": 2.0, "scales": [0.5, 1]}),
            "rl": rl({"algorithm": {"name": "ppo", "gamma": 0.9}}, objective={"beta": 0.0, "correction": {"cap": 3.0}}),
            "rl with another class": rl(objective={"name": "CISPO", "correction": None}, sampling={"temperature": 0.7}),
        }[recipe]
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    printed = yaml.safe_load(dump_config(config))
    names = {field.name for field in fields(config.objective)} - {"temperature", "max_completion_length"}
    assert printed["objective"].keys() == names | {"name"}
    if config.rl is not None:
        assert printed["sampling"].keys() == {"temperature", "top_k", "top_p", "min_p", "stop", "min_tokens"}
        assert {"name", "gamma", "max_refills"} <= printed["rl"]["algorithm"].keys()


def test_what_differs_on_resume_is_named_by_its_key(file):
    def changed(before, after):
        return [str(change) for change in differences(parse_config(before), parse_config(after))]

    assert changed(rl(), rl(objective={"beta": 0.1, "correction": {"cap": 3.0}})) == [
        "objective.beta: 0.0 -> 0.1",
        "objective.correction.cap: 2.0 -> 3.0",
    ]
    assert changed(rl(), rl(sampling={"temperature": 0.5})) == ["sampling.temperature: 1.0 -> 0.5"]
    assert changed(rl(), rl({"algorithm": {"name": "grpo", "max_refills": 2}})) == ["rl.algorithm.max_refills: 0 -> 2"]
    assert changed(rl(), rl({"slots": 3}, callbacks=[{"every": 3, "function": "json:dumps"}])) == []
    focal = {"name": f"{file}:Focal", "gamma": 2.0}
    assert changed(sft(objective=focal), sft(objective=focal | {"gamma": 1.0})) == ["objective.gamma: 2.0 -> 1.0"]
    assert changed(sft(), sft(objective=focal))[0] == f'objective.name: "SFT" -> "{file}:Focal"'
    check_keys(["objective.gamma", "rl.algorithm.max_refills", "sampling"], parse_config(sft(objective=focal)))
    with pytest.raises(ConfigError, match=r"--allow-change objective\.gama: no such key"):
        check_keys(["objective.gama"], parse_config(sft(objective=focal)))


def test_the_default_correction_is_that_of_the_objective():
    assert parse_config(rl()).objective.correction == Correction()
    assert parse_config(rl(objective={"correction": {"level": "sequence"}})).objective.correction == Correction(
        "sequence"
    )
