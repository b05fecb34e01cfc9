import pytest
import yaml

from jaxtrain.config import ALIASES, ConfigError, dump_config, load_config, parse_config
from jaxtrain.config.data import source_name
from jaxtrain.data.files.find import KINDS

GOOD = {"recipe": "sft", "model": {"path": "model"}, "data": {"train": {"path": "train.jsonl"}}}


def fault(tree):
    with pytest.raises(ConfigError) as error:
        parse_config(tree, "run.yaml")
    return str(error.value)


def with_section(**sections):
    return GOOD | sections


def of_rl(rl=None, **sections):
    return GOOD | {"recipe": "rl", "rl": {"rewards": [{"function": "exact_answer"}]} | (rl or {})} | sections


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (
            with_section(optimizer={"learning_rte": 1e-5}),
            "optimizer.learning_rte; did you mean optimizer.learning_rate?",
        ),
        (with_section(optimizer={"lr": 1e-5}), "optimizer.lr; did you mean optimizer.learning_rate?"),
        (with_section(train={"gradient_accumulation_steps": 2}), "did you mean train.microbatches?"),
        (with_section(learning_rate=1e-5), "unknown key learning_rate; did you mean optimizer.learning_rate?"),
        (with_section(optimiser={}), "unknown key optimiser; did you mean optimizer?"),
        (with_section(train={"steps": "many"}), "train.steps: Input should be a valid integer (got 'many')"),
        (with_section(train={"steps": 0}), "train.steps: Input should be greater than 0 (got 0)"),
        (
            with_section(optimizer={"name": "sgd"}),
            "optimizer.name: should be one of adamw, adafactor, muon, or package.module:function, not 'sgd'",
        ),
        (
            with_section(data={"train": {"path": "x"}, "overlong": "keep_completion", "loss_on": "all"}),
            "data: overlong=keep_completion cuts prompts, and loss_on=all trains on them",
        ),
        (with_section(model={}), "model: give either `path`"),
        (with_section(model={"path": "a", "config": {}}), "model: give either `path`"),
        (with_section(model={"path": "a", "lora": {"r": 8}}), "model.lora.r; did you mean model.lora.rank?"),
        (
            with_section(train={"batch_size": 8, "microbatches": 3}),
            "train.batch_size=8 is not a multiple of train.microbatches=3",
        ),
        (
            with_section(train={"steps": 5}, optimizer={"warmup_steps": 6}),
            "optimizer.warmup_steps=6 is more than train.steps=5",
        ),
        (
            with_section(train={"steps": 5, "epochs": 2}),
            "give either train.steps=5 or train.epochs=2, and null for the other",
        ),
        (
            with_section(train={"epochs": 1.5}, data={"train": [{"path": "a", "epochs": 3}, {"path": "b"}]}),
            "train.epochs=1.5 passes over the whole mixture, and epochs=3 of a source in data.train would end that",
        ),
        (
            with_section(optimizer={"warmup_steps": 5, "warmup_ratio": 0.1}),
            "give either warmup_steps=5 or warmup_ratio=0.1",
        ),
        (with_section(num_train_epochs=3), "unknown key num_train_epochs; did you mean train.epochs?"),
        (with_section(warmup_ratio=0.1), "unknown key warmup_ratio; did you mean optimizer.warmup_ratio?"),
        (
            with_section(data=GOOD["data"] | {"eval": [{"path": "a/test.jsonl"}, {"path": "b/test.parquet"}]}),
            "data: two sources of data.eval are called 'test': give each a `name`",
        ),
        (with_section(data={"train": {"pth": "x"}}), "data.train.pth; did you mean data.train.path?"),
        (
            with_section(data={"train": [{"path": "x"}, {"path": "y", "wight": 2}]}),
            "data.train.1.wight; did you mean data.train.1.weight?",
        ),
        ({"recipe": "sft", "model": {"path": "a"}}, "data is missing"),
        (with_section(recipe="stf"), "recipe: Input should be 'sft', 'preference', 'reward', 'distill' or 'rl'"),
        (of_rl(train={"batch_size": 8}), "recipe rl has no train.batch_size: rl.prompts x rl.generations samples"),
        (of_rl(data=GOOD["data"] | {"overlong": "drop"}), "recipe rl has no data.overlong: a prompt that is too long"),
        (of_rl({"placement": {"workers": 2}}), "rl.placement: workers=2 belongs to kind=ray, and this is kind=coloc"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_fault_names_the_full_key_and_the_nearest_right_one(tree, expected):
    assert expected in fault(tree)


def test_all_faults_are_reported_at_once_and_each_once():
    message = fault(
        with_section(train={"steps": "x", "stps": 1}, optimizer={"name": "sgd"}, data={"train": {"pth": "x"}})
    )
    lines = message.splitlines()[1:]
    assert len(lines) == 5, message  # pth unknown, path missing, steps, stps, name


def test_overrides_reach_into_sections_and_lists(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(GOOD | {"data": {"train": [{"path": "a"}, {"path": "b"}]}}))
    overrides = ["data.train.1.path=c", "optimizer.learning_rate=2e-5", "model.lora.rank=4", "train.max_grad_norm=null"]
    config = load_config(file, overrides)
    assert config.data.train[1].path == "c"
    assert config.optimizer.learning_rate == 2e-5
    assert config.model.lora.rank == 4
    assert config.train.max_grad_norm is None


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps.x=3", "data.train.7.path=x", "a=[1"])
def test_a_malformed_override_is_an_error_that_quotes_it(tmp_path, override):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(GOOD | {"train": {"steps": 3}, "data": {"train": [{"path": "a"}]}}))
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace("[", r"\[") or "="):
        load_config(file, [override])


def test_a_dumped_config_reads_back_equal(tmp_path):
    config = parse_config(
        with_section(model={"path": "a", "lora": {"rank": 4}}, optimizer={"learning_rate": 3e-7}), "x"
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/b/test.v2.jsonl.gz", "test.v2"),
        ("chats/*.parquet", "chats"),
        ("chats/", "chats"),
        ("gs://bucket/held_out.json", "held_out"),
        ("https://host/files/test.jsonl?download=true", "test"),
        ("*.jsonl", "data"),
        ("rows:0123", "rows"),
        *((f"a/test{kind}", "test") for kind in KINDS),
        ("a/test.array_record-00000-of-00010", "test"),
    ],
)
def test_a_source_is_called_by_its_file_or_folder(path, name):
    assert source_name(path) == name


@pytest.mark.parametrize("train", [{"steps": 3}, {"epochs": 0.5}])
def test_a_run_needs_a_length_that_something_says(train, tmp_path):
    with pytest.raises(ValueError, match=r"give train.steps or train.epochs: .*\(train.jsonl\)"):
        parse_config(GOOD, "x").check_length()
    parse_config(with_section(data={"train": {"path": "a", "epochs": 1}}), "x").check_length()
    config = parse_config(with_section(train=train, optimizer={"warmup_ratio": 0.1}), "x")
    config.check_length()
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_what_recipe_rl_does_not_use_is_not_dumped_and_may_not_be_overridden(tmp_path):
    config = parse_config(of_rl(train={"microbatches": 3}), "x")  # of whatever the samples fill
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    with pytest.raises(ConfigError, match=r"recipe rl has no train\.batch_size"):
        load_config(tmp_path / "config.yaml", ["train.batch_size=8"])


def test_missing_and_broken_files_are_named(tmp_path):
    (tmp_path / "smollm2.yaml").write_text("recipe: [")
    with pytest.raises(ConfigError, match=r"smolm2\.yaml; did you mean .*smollm2\.yaml"):
        load_config(tmp_path / "smolm2.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "smollm2.yaml")


def test_every_alias_leads_to_a_key_that_exists():
    from jaxtrain.config import known_keys

    assert set(ALIASES.values()) <= dict(known_keys()).keys()


def test_the_surface_of_the_config_is_deliberate():
    """Adding or renaming a key is a decision about the users' files: change this list with it."""
    from jaxtrain.config import known_keys

    keys = sorted(key for key, _ in known_keys())
    assert keys == EXPECTED_KEYS.split(), sorted(set(keys) ^ set(EXPECTED_KEYS.split()))


EXPECTED_KEYS = """
callbacks callbacks.every callbacks.function checkpoint checkpoint.every checkpoint.keep checkpoint.keep_every checkpoint.minutes
data data.chat_template_kwargs data.date data.eval data.eval.args data.eval.columns data.eval.config data.eval.epochs
data.eval.limit data.eval.name data.eval.path data.eval.rows data.eval.source data.eval.split data.eval.weight
data.loss_on data.max_length data.merge data.on_bad_row data.overlong data.packing data.packing_bins data.processes
data.prompt_format data.row_length data.shuffle data.split_turns data.train data.train.args data.train.columns
data.train.config data.train.epochs data.train.limit data.train.name data.train.path data.train.rows data.train.source
data.train.split data.train.weight data.virtual_shards data.workers
distributed distributed.heartbeat_timeout distributed.initialization_timeout distributed.port
distributed.shutdown_timeout distributed.step_timeout distributed.unreachable_timeout
eval eval.batches eval.best eval.best.metric
eval.best.mode eval.best.patience eval.best.target eval.every eval.generate eval.greedy eval.max_new_tokens eval.prompts eval.prompts.args
eval.prompts.columns eval.prompts.config eval.prompts.epochs eval.prompts.limit eval.prompts.name eval.prompts.path
eval.prompts.rows eval.prompts.source eval.prompts.split eval.prompts.weight eval.rewards eval.rewards.args
eval.rewards.function eval.rewards.seconds eval.rewards.weight eval.samples eval.temperature log log.every
log.profile log.to mesh mesh.context mesh.data mesh.expert mesh.fsdp mesh.preset mesh.tensor model model.add_tokens
model.add_tokens.alone model.add_tokens.count model.add_tokens.names model.add_tokens.prefix model.add_tokens.special
model.add_tokens.suffix model.attention model.backend model.chat_template model.compiler_options
model.compute_dtype model.config model.head model.head_chunk
model.lora model.lora.alpha model.lora.dropout model.lora.dtype model.lora.modules_to_save model.lora.path
model.lora.rank model.lora.rslora model.lora.targets model.modules model.modules.attention model.modules.mlp
model.modules.norm model.param_dtype model.path model.quantize model.remat
model.remat.attention model.remat.attention_out model.remat.down model.remat.gate model.remat.qkv model.remat.up
model.router_aux_loss_coef
model.router_z_loss_coef model.splash model.splash.backward_block_kv model.splash.block_kv
model.splash.block_kv_compute model.splash.block_q model.splash.fused_backward model.tokenizer model.vocab_multiple objective objective.aggregation objective.beta
objective.correction objective.correction.cap objective.correction.floor objective.correction.level
objective.correction.mode objective.dual_clip objective.entropy_coefficient objective.entropy_max
objective.entropy_step objective.entropy_target objective.epsilon_high objective.epsilon_low objective.kl
objective.kl_bias_correction objective.kl_in objective.kl_target objective.level objective.name
objective.off_policy_threshold objective.top_entropy optimizer optimizer.args optimizer.b1 optimizer.b2 optimizer.eps
optimizer.final_learning_rate optimizer.learning_rate optimizer.name optimizer.rounding optimizer.schedule optimizer.state_dtype
optimizer.warmup_ratio optimizer.warmup_steps optimizer.weight_decay recipe reference reference.cache
reference.devices reference.path rl rl.algorithm rl.algorithm.bootstrap rl.algorithm.gamma rl.algorithm.lam
rl.algorithm.max_refills rl.algorithm.name rl.algorithm.overlong_cache rl.algorithm.overlong_filter rl.algorithm.scale
rl.algorithm.teacher_coefficient rl.algorithm.teacher_discount rl.critic rl.critic.epsilon rl.critic.learning_rate
rl.environment rl.environment.args rl.environment.factory rl.environment.max_tokens rl.environment.max_turns
rl.environment.seconds rl.environment.weight rl.generations rl.iterations rl.max_completion_length rl.minibatches
rl.placement rl.placement.kind rl.placement.memory rl.placement.processes_per_engine rl.placement.resources rl.placement.rollout_devices rl.placement.staleness
rl.placement.worker_seconds rl.placement.workers rl.print_samples rl.prompts rl.reward_models rl.reward_models.name
rl.reward_models.path rl.reward_models.weight rl.reward_workers rl.rewards rl.rewards.args rl.rewards.function
rl.rewards.seconds rl.rewards.weight rl.slots rl.support run run.dir run.seed sampling sampling.min_p
sampling.min_tokens sampling.stop sampling.temperature sampling.top_k sampling.top_p teacher teacher.aligned teacher.cache
teacher.devices teacher.param_dtype teacher.path teacher.privileged_prompt teacher.top_logps train train.batch_size
train.epochs train.max_grad_norm train.max_skipped_in_a_row train.microbatches train.steps
"""
