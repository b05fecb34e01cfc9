import re

import pytest
from pydantic import ValidationError

from jaxtrain.config import ConfigError, TeacherSection, parse_config
from jaxtrain.config.teacher import template_fields


def config(teacher, recipe="rl", **rl):
    section = {"algorithm": "on_policy_distillation"} | rl
    return parse_config(
        {
            "recipe": recipe,
            "model": {"path": "student"},
            "data": {"train": {"path": "train.jsonl"}},
            "train": {"steps": 1},
            **({} if teacher is None else {"teacher": teacher}),
            **({"rl": section} if recipe == "rl" else {}),
        }
    )


def test_names_in_braces_are_columns():
    assert template_fields("{prompt}\n\n{{x}} {a worked solution}") == ["prompt", "a worked solution"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": "x", "cache": "y", "devices": 2}, "no device holds the teacher"),
        ({"path": "x", "top_logps": 8}, "top_logps is for `cache`"),
        ({"param_dtype": "float32"}, "param_dtype is that of the checkpoint at `path`"),
        ({"privileged_prompt": "solution"}, "must contain {prompt}"),
        ({"privileged_prompt": "{prompt} {}"}, "{} is not the name of a column"),
        ({"privileged_prompt": "{prompt} {0}"}, "{0} is not the name of a column"),
        ({"privileged_prompt": "{prompt} {a.b}"}, "{a.b} is not the name of a column"),
        ({"privileged_prompt": "{prompt} {a!r}"}, "{a} is not the name of a column"),
        (
            {"privileged_prompt": "{prompt} }"},
            "Single '}' encountered in format string; braces that are no {NAME} are written {{ and }}",
        ),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(keys, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        TeacherSection(**keys)


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        (None, {}, "rl.algorithm=on_policy_distillation needs the section `teacher`"),
        (None, {"algorithm": "gkd"}, "rl.algorithm=gkd needs the section `teacher`"),
        (
            {"path": "x"},
            {"algorithm": "grpo", "rewards": [{"function": "exact_answer"}]},
            "`teacher` has no effect with rl.algorithm=grpo",
        ),
        ({"path": "x", "aligned": True}, {"algorithm": "gkd"}, "teacher.aligned does not go with rl.algorithm=gkd"),
        ({"path": "x", "aligned": True}, {"algorithm": "gold"}, "teacher.aligned has no effect with rl.algorithm=gold"),
        ({"privileged_prompt": "{prompt}"}, {"algorithm": "uld"}, "rl.algorithm=uld is for a teacher with another"),
        ({"privileged_prompt": "{prompt}", "aligned": True}, {}, "give teacher.path"),
        ({"path": "x", "cache": "y"}, {}, "teacher.cache is for the rows of data.train"),
        ({}, {}, "give teacher.path, or teacher.privileged_prompt for self-distillation"),
        ({}, {"algorithm": "gkd"}, "give teacher.path"),
        ({"privileged_prompt": "{prompt}"}, {"algorithm": "gkd"}, "does not go with rl.algorithm=gkd"),
        (
            {"privileged_prompt": "{prompt}"},
            {"environment": {"factory": "my_game.py:Game"}},
            "does not go with rl.environment",
        ),
        (
            {"path": "x", "devices": 2},
            {"placement": {"kind": "disjoint", "rollout_devices": 2}},
            "teacher.devices=2 does not go with rl.placement.kind=disjoint",
        ),
        ({}, {"recipe": "distill"}, "teacher.path is missing"),
        ({"path": "x", "privileged_prompt": "{prompt}"}, {"recipe": "distill"}, "privileged_prompt is for recipe rl"),
        ({"path": "x"}, {"recipe": "sft"}, "`recipe: distill` and the section `teacher` belong together"),
    ],
)
def test_what_does_not_go_with_the_recipe_or_the_algorithm_is_refused(teacher, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(teacher, **changes)


def test_a_teacher_of_samples_needs_no_rewards():
    assert config({"path": "x"}).teacher == TeacherSection(path="x")
    assert config({"privileged_prompt": "{prompt} {solution}"}).teacher.path is None
    assert config({"path": "x"}, algorithm="gkd").algorithm.advantages is None
    staleness = {"staleness": 1, "kind": "ray"}
    assert config({"path": "x"}, algorithm="gkd", placement=staleness).rl.placement.staleness == 1
