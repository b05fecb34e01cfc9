"""Every key of config.json is honoured or refused."""

import dataclasses
import json

import hf_folders
import pytest
import transformers

from converters.errors import ConversionError
from converters.families import (
    arcee,
    deepseek_v3,
    exaone4,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    granite,
    llama,
    ministral,
    mistral,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_next,
    seed_oss,
    smollm3,
)
from converters.families.keys import INERT_VALUES
from converters.families.registry import to_hf
from converters.families.shared_keys import HONOURED, IGNORED, REFUSED
from converters.import_hf import read_config
from jaxtrain.nn.config import LayerKind, LinearScaling, Llama3Scaling, LongRopeScaling, Rope

CLASSES = {
    family.MODEL_TYPE: (family, getattr(transformers, f"{name}Config"))
    for family, name in [
        *((llama, "Llama"), (qwen2, "Qwen2"), (qwen3, "Qwen3"), (mistral, "Mistral"), (ministral, "Ministral")),
        *((smollm3, "SmolLM3"), (granite, "Granite"), (olmo2, "Olmo2"), (olmo3, "Olmo3"), (phi3, "Phi3")),
        *(
            (gemma2, "Gemma2"),
            (gemma3, "Gemma3Text"),
            (gemma4, "Gemma4Text"),
            (qwen2_moe, "Qwen2Moe"),
            (qwen3_next, "Qwen3Next"),
        ),
        *(
            (olmoe, "Olmoe"),
            (exaone4, "Exaone4"),
            (seed_oss, "SeedOss"),
            (arcee, "Arcee"),
            (glm4, "Glm4"),
            (glm4_moe, "Glm4Moe"),
        ),
        (deepseek_v3, "DeepseekV3"),
        *((qwen3_5, "Qwen3_5Text"), (qwen3_5_moe, "Qwen3_5MoeText")),
    ]
}
MINIMAL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def hf_dict(case: str, **changes) -> dict:
    hf = hf_folders.hf_config(case).to_dict()
    hf["architectures"] = [hf_folders.CASES[case][0].removesuffix("Text") + "ForCausalLM"]
    return {**hf, **changes}


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_those_of_transformers(name):
    family, theirs = CLASSES[name]
    thetas = theirs.default_theta  # Gemma 3 has two
    thetas = thetas if isinstance(thetas, dict) else {"global": thetas}
    # Keys that transformers reads though they are no field of the class.
    loose = {
        "rope_theta": thetas["global"],
        "rope_local_base_freq": thetas.get("local"),
        "sliding_window_pattern": 6,
        "full_attention_interval": 4,
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "per_layer_config": None,
        "partial_rotary_factor": (theirs().rope_parameters or {}).get("partial_rotary_factor", 1.0),
    }
    fields = {field.name: field.default for field in dataclasses.fields(theirs)}
    expected = {"head_dim": None, **loose, **fields}
    assert {key: expected[key] for key in family.DEFAULTS} == family.DEFAULTS


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_of_transformers_class_is_known(name):
    """A field that a later transformers adds must be reviewed."""
    family, theirs = CLASSES[name]
    own = {f.name for f in dataclasses.fields(theirs)} - {
        f.name for f in dataclasses.fields(transformers.PreTrainedConfig)
    }
    assert (
        own - family.DEFAULTS.keys() - family.INERT.keys() - INERT_VALUES.keys() - {*HONOURED, *IGNORED, *REFUSED}
        == set()
    )


@pytest.mark.parametrize("name", CLASSES)
def test_missing_keys_have_transformers_defaults(name):
    family, theirs = CLASSES[name]
    config, full = family.from_hf({}), family.from_hf(theirs().to_dict())
    assert config == full


@pytest.mark.parametrize("case", hf_folders.CASES)
def test_config_round_trip(case):
    hf = hf_dict(case)
    config, _ = read_config(hf)
    assert to_hf(config, hf) == hf
    alone = to_hf(config)
    assert read_config(alone)[0] == config
    assert alone["architectures"] == hf["architectures"]


def test_only_what_changed_is_rewritten():
    hf = hf_dict("qwen3", a_key_of_nobody=[1, 2])
    config, _ = read_config(hf)
    changed = dataclasses.replace(config, vocab_size=140)
    assert to_hf(changed, hf) == {**hf, "vocab_size": 140}


def test_a_changed_rope_replaces_the_old_spelling():
    hf = {**MINIMAL, "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    config, _ = read_config(hf)
    written = to_hf(dataclasses.replace(config, pattern=(LayerKind(None, Rope(3e5)),) * 32), hf)
    assert written == {**MINIMAL, "rope_parameters": {"rope_type": "default", "rope_theta": 3e5}}


def test_a_config_that_a_family_cannot_express_is_refused():
    config, _ = read_config(hf_dict("qwen2"))
    with pytest.raises(ConversionError, match="family qwen2 cannot express qk_norm=all"):
        to_hf(dataclasses.replace(config, qk_norm="all"))


LLAMA3_SCALING = Llama3Scaling(4.0, 1.0, 4.0, 64)
SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({}, Rope(10_000.0)),
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_theta": 1000000}, Rope(1e6)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, Rope(5e5)),
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 5e5}}, Rope(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, Rope(5e5, LinearScaling(2.0))),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}}, Rope(5e5, LLAMA3_SCALING)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **SCALING}}, Rope(5e5, LLAMA3_SCALING)),
    ],
    ids=str,
)
def test_rope_in_both_spellings(keys, rope):
    assert read_config({**MINIMAL, **keys})[0].pattern[0].rope == rope
    theirs = transformers.LlamaConfig(**{**MINIMAL, **keys}).to_dict()
    assert read_config({**MINIMAL, "rope_parameters": theirs["rope_parameters"]})[0].pattern[0].rope == rope


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_phi3_reads_longrope_under_its_old_names(name):
    """As in Phi-4-mini: the original length is outside of the section and determines the attention factor."""
    factors = [1.0 + i / 100 for i in range(36)]
    scaling = {"type": name, "short_factor": factors, "long_factor": factors[::-1]}
    hf = {
        "architectures": ["Phi3ForCausalLM"],
        "partial_rotary_factor": 0.75,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 2048,
        "rope_scaling": scaling,
    }
    rope = Rope(1e4, LongRopeScaling(tuple(factors), tuple(factors[::-1]), 2048, (1 + 6 / 11) ** 0.5), 0.75)
    assert read_config(hf)[0].pattern[0].rope == rope
    scaling["original_max_position_embeddings"] = 2048  # of su, transformers wants it here too
    theirs = transformers.Phi3Config(**json.loads(json.dumps(hf))).to_dict()
    assert read_config(theirs)[0].pattern[0].rope == rope


def test_phi3_refuses_a_rope_that_transformers_lacks_there():
    with pytest.raises(ConversionError, match=r"rope_type='linear'.*known: default, longrope"):
        phi3.from_hf({"rope_scaling": {"type": "linear", "factor": 2.0}})


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({}, [None] * 4),
        ({"sliding_window": 9}, [None] * 4),
        ({"use_sliding_window": True, "sliding_window": None}, [None] * 4),
        ({"use_sliding_window": True, "sliding_window": 9}, [None] * 4),  # max_window_layers is 28
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, [None, None, None, 9]),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            [9, None, 9, None],
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_windows(name, keys, windows):
    family, theirs = CLASSES[name]
    keys = {"num_hidden_layers": 4, **keys}
    assert [kind.window for kind in family.from_hf(keys).pattern] == windows
    reference = theirs(**keys)
    assert [kind == "sliding_attention" for kind in reference.layer_types] == [w is not None for w in windows]


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "axial", "factor": 2.0}}, "rope_parameters.rope_type='axial'"),
        ("llama", {"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope_scaling.rope_type='mrope'"),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor must be a number"),
        ("llama", {"rope_scaling": {"type": "longrope", "short_factor": 1}}, "short_factor must be a list of numbers"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor must be a number"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "beta_fast": 3}},
            "rope_parameters.beta_fast is not supported",
        ),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": {"rope_theta": "big"}}, "rope_parameters.rope_theta must be a number"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"is_causal": False}, "is_causal=False is not supported"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures must be a list of one name"),
        ("llama", {"hidden_act": "xielu"}, "hidden_act='xielu'.*known: silu"),
        ("llama", {"sliding_window": 4096}, "sliding_window=4096"),
        ("llama", {"num_local_experts": 8}, "num_local_experts=8"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_size": "56"}, "hidden_size must be a positive integer, not '56'"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, not True"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps must be a number"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ("llama", {"num_key_value_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ("qwen2", {"attention_bias": False}, "attention_bias=False"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers is 3"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "layer_types holds 'linear_attention'"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "no sliding_window is in use"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"architectures": ["LamaForCausalLM"]}, "LamaForCausalLM is not supported.*mean LlamaForCausalLM"),
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, "supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen2Moe"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification is not supp"),
        (
            "llama",
            {"architectures": None, "model_type": "gpt2"},
            "gpt2 is not supported; supported: llama, qwen2, qwen2_moe, qwen3",
        ),
    ],
    ids=str,
)
def test_unsupported_keys_are_refused_by_name(case, changes, message):
    with pytest.raises(ValueError, match=message):
        read_config(hf_dict(case, **changes))


def test_model_type_stands_in_for_missing_architectures():
    assert read_config({"model_type": "qwen2"})[0].family == "qwen2"


def test_missing_folder_and_config(tmp_path):
    with pytest.raises(ConversionError, match="no checkpoint folder"):
        read_config(tmp_path / "nothing")
    with pytest.raises(ConversionError, match=r"holds no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ConversionError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConversionError, match="must be an object, not list"):
        read_config(tmp_path)


@pytest.mark.parametrize("key", ["pretraining_tp", "attention_dropout"])
def test_keys_that_do_not_change_what_is_computed_are_ignored(key):
    assert read_config(hf_dict("llama", **{key: 2}))[0] == read_config(hf_dict("llama"))[0]


def test_a_folder_with_an_adapter_beside_the_model(tmp_path):
    """transformers would load the base that the adapter names."""
    hf_folders.save(tmp_path, "llama")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"holds adapter_config\.json next to config\.json"):
        read_config(tmp_path)
