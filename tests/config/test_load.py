"""From YAML and overrides to a config, and back."""

import pytest
import yaml

from jaxtrain.config.load import ConfigError, dump_config, load_config, merged_text, parse_config

TREE = {"recipe": "sft", "model": {"path": "model"}, "data": {"train": {"path": "a.jsonl"}}}
RL = TREE | {"recipe": "rl", "rl": {"rewards": [{"function": "exact_answer"}]}}


@pytest.mark.parametrize("text", ["2e-5", "+2E-05", ".2e-4", "2.0e-5", "0.00002"])
def test_a_number_with_an_exponent_is_a_number(tmp_path, text):
    """YAML 1.1 reads some of these as strings."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(TREE) + f"optimizer: {{learning_rate: {text}}}\n")
    for config in (load_config(file), parse_config(dict(TREE), "x", [f"optimizer.learning_rate={text}"])):
        assert config.optimizer.learning_rate == pytest.approx(2e-5)


def test_an_override_below_a_name_alone_keeps_the_name():
    tree = RL | {"objective": "GSPO", "rl": RL["rl"] | {"algorithm": "gspo"}}
    config = parse_config(tree, "x", ["objective.beta=0.5", "rl.algorithm.max_refills=2"])
    assert (type(config.objective).__name__, config.objective.beta) == ("GSPO", 0.5)
    assert (config.algorithm.name, config.algorithm.max_refills) == ("gspo", 2)


@pytest.mark.parametrize(
    "tree",
    [TREE, RL, RL | {"sampling": {"top_p": 0.5}}, TREE | {"objective": {"name": "SFT"}, "callbacks": []}],
)
def test_what_is_dumped_is_read_back_as_an_equal_config(tree, tmp_path):
    config = parse_config(tree, "x")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_the_origin_is_named_and_a_fault_at_an_index_keeps_the_index():
    with pytest.raises(ConfigError, match=r"^my\.yaml:\n  unknown key data\.train\.1\.pth; did you mean data\."):
        parse_config(TREE | {"data": {"train": [{"path": "a"}, {"path": "b", "pth": "c"}]}}, "my.yaml")


def test_a_fault_of_an_override_is_not_blamed_on_the_file():
    with pytest.raises(ConfigError, match=r"^my\.yaml:\n  unknown key lr; .*\noverrides:\n  train\.steps: .*'ten'"):
        parse_config(TREE | {"lr": 1e-5}, "my.yaml", ["train.steps=ten"])
    with pytest.raises(ConfigError, match=r"^overrides:\n  train\.steps: .*-1\)$"):
        parse_config(TREE | {"train": {"steps": 3}}, "my.yaml", ["train={steps: -1}"])


def test_a_file_extends_another(tmp_path):
    (tmp_path / "shared").mkdir()
    train = {"steps": 3, "batch_size": 16}
    (tmp_path / "shared" / "base.yaml").write_text(yaml.safe_dump(TREE | {"train": train, "callbacks": []}))
    changes = {"extends": "shared/base.yaml", "train": {"steps": 5}, "run": {"dir": "x"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changes))
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({"extends": "run.yaml", "run": {"dir": "y"}}))
    expected = TREE | {"train": {"steps": 5, "batch_size": 16}, "run": {"dir": "x"}}
    assert load_config(tmp_path / "run.yaml") == parse_config(expected)
    assert load_config(tmp_path / "again.yaml", ["train.steps=7"]) == parse_config(
        expected | {"run": {"dir": "y"}, "train": {"steps": 7, "batch_size": 16}}
    )


def test_null_removes_a_key_of_the_extended_file_that_cannot_be_null(tmp_path):
    train = {"steps": 3, "batch_size": 16, "max_grad_norm": 0.5}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(TREE | {"train": train}))
    changes = {"extends": "base.yaml", "train": {"batch_size": None, "max_grad_norm": None}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changes))
    config = load_config(tmp_path / "run.yaml")
    assert config == parse_config(TREE | {"train": {"steps": 3, "max_grad_norm": None}})
    assert config.train.max_grad_norm is None and "batch_size" not in config.train.model_fields_set
    (tmp_path / "run.yaml").write_text("extends: base.yaml\ntrain: {microbatches: null}\n")
    with pytest.raises(ConfigError, match=r"train\.microbatches: Input should be a valid integer \(got None\)"):
        load_config(tmp_path / "run.yaml")


def test_the_whole_text_of_a_file_needs_no_other(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(TREE))
    (tmp_path / "run.yaml").write_text("extends: base.yaml\ntrain: {steps: 2}  # few\n")
    assert yaml.safe_load(merged_text(tmp_path / "run.yaml")) == TREE | {"train": {"steps": 2}}
    assert merged_text(tmp_path / "base.yaml") == (tmp_path / "base.yaml").read_text()


def test_files_that_extend_each_other_or_nothing_are_named(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml extends itself, through .*a\.yaml, .*b\.yaml"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("extends: [b.yaml]")
    with pytest.raises(ConfigError, match=r"a\.yaml: extends must be the path of a YAML file \(got \['b\.yaml'\]\)"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("extends: c.yaml")
    with pytest.raises(ConfigError, match=r"no config file .*c\.yaml"):
        load_config(tmp_path / "a.yaml")


def test_a_path_in_the_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    config = parse_config(TREE, overrides=["run.dir=~/runs/x", "data.train.path=~/d.jsonl", "model.tokenizer=a~/b"])
    assert (config.run.dir, config.data.train.path) == ("/home/ada/runs/x", "/home/ada/d.jsonl")
    assert config.model.tokenizer == "a~/b"
