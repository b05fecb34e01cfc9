"""The sections of a run's YAML file, and what must fit together in them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)
from pydantic_core import PydanticKnownError

from jaxtrain.config.given import plain_rows, rows_path
from jaxtrain.config.marks import INPUT_PATH, MAY_CHANGE, MayChange

NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
DType = Literal["float32", "bfloat16", "float16"]


def _size_or_rest(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("should be greater than 0, or -1 for all devices that are left")
    return value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunSection(Section):
    dir: Annotated[str, MAY_CHANGE] = "runs/default"  # everything the run writes
    seed: NonNegativeInt = 0


class LoraSection(Section):
    # a PEFT folder to start from; it then determines the four keys below
    path: Annotated[str | None, INPUT_PATH] = None
    rank: PositiveInt | None = None  # default: 16
    alpha: PositiveFloat | None = None  # default: 32
    rslora: bool | None = None  # scale by alpha / sqrt(rank) instead of alpha / rank; default: False
    targets: list[str] | None = None  # names, globs (`attn.*`) or all-linear; default: the seven *_proj of a layer
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dtype: DType = "float32"  # of the adapters; model.param_dtype is the base's


class AddTokensSection(Section):
    names: list[str] = []
    prefix: str | None = None  # and so many more: prefix + number + suffix
    suffix: str = ">"
    count: NonNegativeInt = 0
    special: bool = False  # left out where text is decoded without special tokens
    alone: bool = False  # train the new rows and nothing else

    @property
    def tokens(self) -> list[str]:
        return [*self.names, *(f"{self.prefix}{number}{self.suffix}" for number in range(self.count))]

    @model_validator(mode="after")
    def _some(self) -> AddTokensSection:
        if (self.prefix is None) != (self.count == 0):
            raise ValueError("`prefix` and `count` belong together")
        if not self.tokens:
            raise ValueError("give `names`, or `prefix` and `count`")
        if len(set(self.tokens)) < len(self.tokens):
            raise ValueError("a token is named twice")
        return self


class ModulesSection(Section):
    attention: str | None = None  # package.module:Class; default: jaxtrain.nn.attention:Attention
    mlp: str | None = None  # default: jaxtrain.nn.mlp:GatedMLP, or jaxtrain.nn.moe:SparseMLP
    norm: str | None = None  # default: jaxtrain.nn.norm:RMSNorm


class ModelSection(Section):
    path: Annotated[str | None, INPUT_PATH] = None  # a Hugging Face folder: config.json, *.safetensors, tokenizer
    config: dict[str, Any] | None = None  # instead of `path`: a config.json's content, random weights
    # a tokenizer's folder; default: `path`; none at all where all rows are input_ids
    tokenizer: Annotated[str | None, INPUT_PATH] = None
    add_tokens: AddTokensSection | None = None  # new rows of the vocabulary, at the mean of the old ones
    chat_template: Annotated[str | None, INPUT_PATH] = None  # a jinja file that replaces the tokenizer's own template
    compute_dtype: DType = "bfloat16"
    param_dtype: DType = "float32"
    remat: Annotated[Literal["none", "dots", "full"], MAY_CHANGE] = "full"  # what the backward pass computes again
    attention: Annotated[Literal["auto", "xla", "splash", "cudnn"], MAY_CHANGE] = "auto"
    modules: ModulesSection = ModulesSection()  # classes that replace modules of the decoder: see docs/modules.md
    head: str = "lm"  # or `scalar` (rewards, values), or package.module:function (a head of one's own)
    backend: Literal["jaxtrain", "torchax"] = "jaxtrain"  # torchax: any architecture of transformers, less able
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0  # of the load-balancing loss of a mixture of experts
    router_z_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    lora: LoraSection | None = None
    quantize: Literal["int8", "nf4"] | None = None  # the frozen kernels under LoRA are held in so many bits
    vocab_multiple: PositiveInt = 64

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either `path` (a checkpoint) or `config` (random weights), not both and not neither")
        alone = self.add_tokens is not None and self.add_tokens.alone
        if alone and self.lora is not None:
            raise ValueError("add_tokens.alone leaves nothing to `lora`, under which new rows are trained anyway")
        if self.quantize is not None and self.lora is None and not alone:
            raise ValueError(f"quantize={self.quantize} needs `lora` or `add_tokens.alone`: such weights are frozen")
        if self.add_tokens is not None and self.config is not None and self.tokenizer is None:
            raise ValueError("add_tokens needs `tokenizer`")
        return self


def _not_missing(path: str) -> str:
    if not path:
        raise PydanticKnownError("missing")
    return path


class SourceSection(Section):
    """Where rows of data are read from: files under `path`, or `rows` that a program gives.

    A run with `rows` records their fingerprint as its `path`, and is resumed only with equal ones.
    """

    # .jsonl (.gz, .zst) or .parquet: a file, a folder of them or a glob
    path: Annotated[str, INPUT_PATH, AfterValidator(_not_missing)] = Field(default="", validate_default=True)
    # instead of `path`, in a program: dicts with the columns of a file's row
    rows: Annotated[Any, MAY_CHANGE] = Field(default=None, exclude=True, repr=False)
    columns: dict[str, str] = {}  # our column name -> the file's, e.g. {prompt: question, completion: answer}
    weight: PositiveFloat = 1.0  # share of the mixture, over the sum of the weights
    epochs: PositiveInt | None = None  # passes over this source, after which it ends; default: without end
    limit: PositiveInt | None = None  # use only the first rows

    @model_validator(mode="before")
    @classmethod
    def _one_origin(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if "rows" not in values:
            return values
        if "path" in values:
            raise ValueError("give either `path` (files) or `rows` (a list of dicts), not both")
        rows = plain_rows(values["rows"])
        return {**values, "rows": rows, "path": rows_path(rows)}


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
    workers: Annotated[PositiveInt, MAY_CHANGE] = 2  # threads that read and tokenise

    @property
    def train_sources(self) -> list[SourceSection]:
        return self.train if isinstance(self.train, list) else [self.train]

    @property
    def eval_sources(self) -> list[SourceSection]:
        """None at all where there is no `eval`."""
        return self.eval if isinstance(self.eval, list) else [] if self.eval is None else [self.eval]


def _longer_at_a_constant_rate(old: int, new: int, config: Any) -> bool:
    return new > old and config.optimizer.schedule == "constant"


class TrainSection(Section):
    # at a constant rate a longer run may be resumed; other schedules depend on the number of steps
    steps: Annotated[PositiveInt, MayChange(_longer_at_a_constant_rate)] = 1000
    batch_size: PositiveInt = 8  # packed rows of the global batch; recipe rl: as many as a step's samples fill
    # the batch is computed in this many pieces (gradient accumulation)
    microbatches: Annotated[PositiveInt, MAY_CHANGE] = 1
    max_grad_norm: PositiveFloat | None = 1.0
    max_skipped_in_a_row: Annotated[PositiveInt, MAY_CHANGE] = 5  # non-finite gradients in a row that end the run


def _one_of_or_path(*known: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in known and ":" not in value:
            raise ValueError(f"should be one of {', '.join(known)}, or package.module:function, not {value!r}")
        return value

    return AfterValidator(check)


class OptimizerSection(Section):
    name: Annotated[str, _one_of_or_path("adamw", "adafactor", "muon")] = "adamw"  # or package.module:function
    learning_rate: PositiveFloat = 2e-5
    schedule: Annotated[str, _one_of_or_path("constant", "linear", "cosine")] = "cosine"  # or package.module:function
    warmup_steps: NonNegativeInt = 0
    final_learning_rate: Fraction = 0.0  # as a share of learning_rate, where the schedule ends
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # matrices only: norms, biases and embeddings never decay
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    state_dtype: DType = "float32"  # of the first moment
    args: dict[str, Any] = {}  # read by a function that `name` or `schedule` names by import path

    @model_validator(mode="after")
    def _args_are_read(self) -> OptimizerSection:
        if self.args and ":" not in self.name + self.schedule:
            raise ValueError(f"args are for an optimizer or schedule named by import path, not for {self.name}")
        return self


class MeshSection(Section):
    preset: Literal["fsdp", "fsdp_tensor", "fsdp_expert"] = "fsdp"  # how parameters lie on the axes
    data: PositiveInt = 1  # replicas
    fsdp: Annotated[
        int, AfterValidator(_size_or_rest)
    ] = -1  # parameters and rows are split; -1: all devices that are left
    expert: PositiveInt = 1  # experts and rows are split
    tensor: PositiveInt = 1  # heads, hidden width and vocabulary are split


class CheckpointSection(Section):
    every: PositiveInt = 500
    keep: PositiveInt = 2


class EvalSection(Section):
    every: Annotated[PositiveInt, MAY_CHANGE] = 500
    batches: PositiveInt | None = None  # of train.batch_size rows; default: all of data.eval
    generate: NonNegativeInt = 0  # held-out prompts to answer greedily; their exact-match accuracy is logged
    max_new_tokens: PositiveInt = 64


class LogSection(Section):
    every: PositiveInt = 10
    tensorboard: bool = True
