"""A value of the wrong type is an error that names the key, for every key of every family."""

import pytest

from converters.families.registry import FAMILIES
from converters.import_hf import read_config

STRANGE = ("x", "", -1, 0, 0.5, 3, True, [], [3], ["x"], [[3]], {}, {"a": 1}, None, float("nan"), float("inf"), 10**400)
TOP = ("architectures", "model_type", "rope_parameters", "rope_scaling", "rope_theta", "quantization_config")


@pytest.mark.parametrize("name", FAMILIES)
def test_any_json_value_is_read_or_refused(name):
    family = FAMILIES[name]
    keys = {*family.DEFAULTS, *family.INERT, *TOP}
    for key in keys:
        for value in STRANGE:
            try:
                read_config({"architectures": [family.ARCHITECTURE], "num_hidden_layers": 2, key: value})
            except ValueError as error:
                assert str(error)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_any_json_value_within_rope_is_read_or_refused(name, spelling):
    keys = ("rope_type", "rope_theta", "factor", "truncate", "short_factor", "beta_fast", "mscale", "full_attention")
    for kind in ("default", "linear", "dynamic", "yarn", "longrope", "llama3"):
        for key in keys:
            for value in STRANGE:
                rope = {"rope_type": kind, "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0], key: value}
                for section in (rope, {"full_attention": rope}):
                    try:
                        read_config({"architectures": [FAMILIES[name].ARCHITECTURE], spelling: section})
                    except ValueError as error:
                        assert str(error)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), True, "1e-6", 10**400, 0, None])
def test_numbers_are_finite_and_positive(value):
    with pytest.raises(ValueError, match=r"config\.json: rms_norm_eps must be a number above 0"):
        read_config({"architectures": ["LlamaForCausalLM"], "rms_norm_eps": value})
