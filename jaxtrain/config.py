"""The tree of a run: one YAML file, dotted overrides, and errors that name the key and the nearest right one."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)

NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
DType = Literal["float32", "bfloat16", "float16"]


def _size_or_rest(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("should be greater than 0, or -1 for all devices that are left")
    return value


class ConfigError(ValueError):
    """A config that cannot be run. The message names every wrong key by its full path."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunSection(Section):
    dir: str = "runs/default"  # everything the run writes
    seed: NonNegativeInt = 0


class LoraSection(Section):
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ModelSection(Section):
    path: str | None = None  # a Hugging Face folder: config.json, *.safetensors, tokenizer
    config: dict[str, Any] | None = None  # instead of `path`: a config.json's content, random weights
    tokenizer: str | None = None  # a tokenizer's folder; default: `path`
    chat_template: str | None = None  # a jinja file that replaces the tokenizer's own template
    compute_dtype: DType = "bfloat16"
    param_dtype: DType = "float32"
    remat: Literal["none", "dots", "full"] = "full"  # what the backward pass computes again
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    lora: LoraSection | None = None
    vocab_multiple: PositiveInt = 64

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either `path` (a checkpoint) or `config` (random weights), not both and not neither")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("`config` (random weights) also needs `tokenizer`")
        return self


class SourceSection(Section):
    path: str  # .jsonl (.gz, .zst) or .parquet: a file, a folder of them or a glob
    columns: dict[str, str] = {}  # our column name -> the file's, e.g. {prompt: question, completion: answer}
    weight: PositiveFloat = 1.0  # share of the mixture, over the sum of the weights
    epochs: PositiveInt | None = None  # passes over this source before it runs dry; default: without end
    limit: PositiveInt | None = None  # use only the first rows


# The tag picks one branch, so that a fault is reported for what the user wrote and not for both.
Sources = Annotated[
    Annotated[SourceSection, Tag("<one>")] | Annotated[list[SourceSection], Tag("<mixture>")],
    Discriminator(lambda value: "<mixture>" if isinstance(value, list) else "<one>"),
]


class DataSection(Section):
    train: Sources
    eval: Sources | None = None
    max_length: PositiveInt = 2048  # T: tokens of a packed row, and so the longest example
    overlong: Literal["truncate", "drop", "split"] = "truncate"
    on_bad_row: Literal["error", "skip"] = "error"
    loss_on: Literal["assistant", "all"] = "assistant"  # `all` trains on prompts too
    prompt_format: Literal["chat", "plain"] = "chat"  # what a prompt and a completion that are strings become
    packing: bool = True  # False: one example a row, padded
    packing_bins: PositiveInt = 16  # open rows of a virtual shard: more pack denser and start later
    virtual_shards: PositiveInt | None = None  # default: the largest power of two up to 8 that divides train.batch_size
    shuffle: bool = True
    workers: PositiveInt = 2  # threads that read and tokenise


class TrainSection(Section):
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 8  # packed rows of the global batch
    microbatches: PositiveInt = 1  # the batch is computed in so many pieces (gradient accumulation)
    max_grad_norm: PositiveFloat | None = 1.0
    max_skipped_in_a_row: PositiveInt = 5  # non-finite gradients in a row that end the run

    @model_validator(mode="after")
    def _divides(self) -> TrainSection:
        if self.batch_size % self.microbatches:
            raise ValueError(f"batch_size={self.batch_size} is no multiple of microbatches={self.microbatches}")
        return self


class OptimizerSection(Section):
    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: PositiveFloat = 2e-5
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    final_learning_rate: Fraction = 0.0  # as a share of learning_rate, where the schedule ends
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # matrices only: norms, biases and embeddings never decay
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    state_dtype: DType = "float32"  # of the first moment


class MeshSection(Section):
    preset: Literal["fsdp", "fsdp_tensor"] = "fsdp"  # how parameters lie on the axes
    data: PositiveInt = 1  # replicas
    fsdp: Annotated[
        int, AfterValidator(_size_or_rest)
    ] = -1  # parameters and rows are split; -1: all devices that are left
    tensor: PositiveInt = 1  # heads, hidden width and vocabulary are split


class CheckpointSection(Section):
    every: PositiveInt = 500
    keep: PositiveInt = 2


class EvalSection(Section):
    every: PositiveInt = 500
    batches: PositiveInt | None = None  # of train.batch_size rows; default: all of data.eval
    generate: NonNegativeInt = 0  # held-out prompts to answer greedily; their exact-match accuracy is logged
    max_new_tokens: PositiveInt = 64


class LogSection(Section):
    every: PositiveInt = 10
    tensorboard: bool = True


class RunConfig(Section):
    recipe: Literal["sft"]
    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    mesh: MeshSection = MeshSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.optimizer.warmup_steps > self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is more than train.steps={self.train.steps}"
            )
        if self.eval.generate and self.data.eval is None:
            raise ValueError("eval.generate needs data.eval")
        return self


# What users of other frameworks type, and what it is called here.
ALIASES = {
    "lr": "optimizer.learning_rate",
    "learning_rate": "optimizer.learning_rate",
    "warmup_steps": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "lr_scheduler_type": "optimizer.schedule",
    "max_steps": "train.steps",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.microbatches",
    "max_grad_norm": "train.max_grad_norm",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "seq_len": "data.max_length",
    "dataset": "data.train.path",
    "model_name_or_path": "model.path",
    "output_dir": "run.dir",
    "seed": "run.seed",
    "bf16": "model.compute_dtype",
    "gradient_checkpointing": "model.remat",
    "save_steps": "checkpoint.every",
    "eval_steps": "eval.every",
    "logging_steps": "log.every",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
}


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `dotted.key=value` overrides (values are YAML), check everything.

    Raises ConfigError for a missing file, broken YAML, an unknown key, a wrong type or an impossible combination.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        raise ConfigError(f"no config file {path}" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of sections, not {type(tree).__name__}")
    for override in overrides or []:
        _override(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], origin: str) -> RunConfig:
    """Check a plain tree; `origin` is named in the errors. Raises ConfigError that lists every fault at once."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        faults = [_fault(e["loc"], e["type"], e["msg"], e["input"]) for e in error.errors()]
        raise ConfigError(f"{origin}:\n" + "\n".join(f"  {fault}" for fault in faults)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved tree as YAML, which `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-5` as a string, as everybody finds out once. This one reads it as a number."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_FLOAT = r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, key)]
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {key}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"override {key}: {part!r} is no index into a list of {len(node)}")
    return int(part)


def _fault(loc: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    # pydantic puts the tag of a union into the path; it is no key of the user's.
    keys = [str(part) for part in loc if not str(part).startswith("<")]
    path = ".".join(keys)
    if kind == "extra_forbidden":
        return f"unknown key {path}" + _suggest(keys)
    if kind == "missing":
        return f"{path} is missing"
    message = message.removeprefix("Value error, ")
    shown = "" if isinstance(value, dict | BaseModel) or kind == "value_error" else f" (got {value!r})"
    return f"{path}: {message}{shown}" if path else f"{message}{shown}"


def _suggest(keys: list[str]) -> str:
    """The nearest right key: in the same section, else by another framework's name, else anywhere."""
    *section, last = keys
    # An index into a list of sources is part of the path, but of no key's name.
    prefix = "".join(f"{part}." for part in section if not part.isdigit())
    known = dict(_known_keys(RunConfig, ""))
    siblings = [key.removeprefix(prefix) for key in known if key.startswith(prefix)]
    siblings = [name for name in siblings if "." not in name]
    near = difflib.get_close_matches(last, siblings, 1) or [name for name in siblings if name.startswith(last)]
    if near:
        return f"; did you mean {'.'.join([*section, near[0]])}?"
    elsewhere = [ALIASES[last]] if last in ALIASES else [key for key in known if key.rpartition(".")[2] == last]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known here: {', '.join(siblings)}"


def _known_keys(section: type[BaseModel], prefix: str):
    for name, field in section.model_fields.items():
        yield prefix + name, field
        for inner in dict.fromkeys(_sections(field.annotation)):
            yield from _known_keys(inner, f"{prefix}{name}.")


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (UnionType, Union, Annotated, list):
        return [s for arg in get_args(annotation) for s in _sections(arg)]
    return []
