"""The sections of a run's YAML file, and what must fit together in them."""

from __future__ import annotations

import math
from collections import Counter
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)
from pydantic_core import PydanticKnownError

from jaxtrain.config.marks import INPUT_PATH, MAY_CHANGE, MayChange
from jaxtrain.config.python_values import ROWS_PREFIX, Given, plain_rows, rows_path, source_path

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
    dir: Annotated[str, MAY_CHANGE] = "runs/default"  # everything the run writes; a folder or a URL
    seed: NonNegativeInt = 0


class LoraSection(Section):
    # a PEFT folder to start from; it then determines the five keys below
    path: Annotated[str | None, INPUT_PATH] = None
    rank: PositiveInt | None = None  # default: 16
    alpha: PositiveFloat | None = None  # default: 32
    rslora: bool | None = None  # scale by alpha / sqrt(rank) instead of alpha / rank; default: False
    targets: list[str] | None = None  # names, globs (`attn.*`) or all-linear; default: the seven *_proj of a layer
    # modules that are trained in full beside the adapters, e.g. [embed_tokens, lm_head, norm]: names or globs, by
    # transformers' names of modules or ours; default: those of `path`, or none
    modules_to_save: list[str] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dtype: DType = "float32"  # of the adapters and of modules_to_save; model.param_dtype is the base's


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


Place = Literal["keep", "recompute", "offload"]


class RematSection(Section):
    """What becomes of the activations of a layer until its backward pass: kept, computed again, or moved to the host's
    memory. The input of a layer is always kept."""

    qkv: Place = "recompute"  # queries, keys and values as they are projected
    attention: Place = "recompute"  # the output of the attention, and one float per head and token
    attention_out: Place = "recompute"  # the output of the projection of `attention`
    gate: Place = "recompute"  # of a dense feed-forward layer, before the activation function
    up: Place = "recompute"
    down: Place = "recompute"  # used only by a norm after the layer (Gemma)


RematSetting = Annotated[
    Annotated[Literal["none", "dots", "full"], Tag("<preset>")] | Annotated[RematSection, Tag("<names>")],
    Discriminator(lambda value: "<names>" if isinstance(value, dict | RematSection) else "<preset>"),
]


class ModelSection(Section):
    path: Annotated[str | None, INPUT_PATH] = None  # a Hugging Face folder, a URL or a name on the hub
    config: dict[str, Any] | None = None  # instead of `path`: a config.json's content, random weights
    # a tokenizer's folder; default: `path`; none at all where all rows are input_ids
    tokenizer: Annotated[str | None, INPUT_PATH] = None
    add_tokens: AddTokensSection | None = None  # new rows of the vocabulary, at the mean of the old ones
    # in place of the tokenizer's: a jinja file, or builtin:qwen3-thinking, which keeps the thoughts of all turns
    chat_template: Annotated[str | None, INPUT_PATH] = None
    compute_dtype: DType = "bfloat16"
    param_dtype: DType = "float32"
    # full: `attention` alone is kept; dots: all that `RematSection` names; none: nothing is computed again
    remat: Annotated[RematSetting, MAY_CHANGE] = "full"
    attention: Annotated[Literal["auto", "xla", "splash", "cudnn"], MAY_CHANGE] = "auto"
    # tokens of a chunk of logits on each device; default: 2048 on TPU (v5e: 512) and GPU, 512 elsewhere
    head_chunk: Annotated[PositiveInt | None, MAY_CHANGE] = None
    # of XLA, for the training step, prefill and decode
    compiler_options: Annotated[dict[str, str | int | float | bool], MAY_CHANGE] = {}
    modules: ModulesSection = ModulesSection()  # classes that replace modules of the decoder: see docs/modules.md
    head: str = "lm"  # or `scalar` (rewards, values), or package.module:function (a head of one's own)
    backend: Literal["jaxtrain", "torchax"] = (
        "jaxtrain"  # torchax: any architecture of transformers, with fewer features
    )
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
    """Where rows of data are read from: files under `path`, a function `source`, or `rows` that a program gives.

    A run with `rows` records their fingerprint as its `path`, and is resumed only with equal ones.
    """

    # .jsonl .json .csv (.gz, .zst) .parquet .arrow .array_record: a file, a folder of them or a glob, local or a URL;
    # or hf:owner/name[@revision], a data set on the Hugging Face hub
    path: Annotated[str, INPUT_PATH, AfterValidator(_not_missing)] = Field(default="", validate_default=True)
    config: str | None = None  # of a data set on the hub
    split: str | None = None  # of a data set on the hub
    # instead of `path`: package.module:function, which returns a sequence, a grain data set or an iterable of rows
    source: Given | None = None
    args: dict[str, Any] = {}  # of `source`
    # instead of `path`, in a program: dicts with the columns of a file's row
    rows: Annotated[Any, MAY_CHANGE] = Field(default=None, exclude=True, repr=False)
    name: Annotated[str | None, MAY_CHANGE] = None  # in eval_NAME_loss; default: the file's or folder's
    columns: dict[str, str] = {}  # our column name -> the file's, e.g. {prompt: question, completion: answer}
    weight: PositiveFloat = 1.0  # share of the mixture, over the sum of the weights
    epochs: PositiveInt | None = None  # passes over this source, after which it ends; default: as long as the run
    limit: PositiveInt | None = None  # use only the first rows

    @property
    def rows_key(self) -> str:
        """Equal for sections that have the same rows under the same column names."""
        return repr((self.path, self.config, self.split, self.limit, sorted(self.columns.items())))

    @model_validator(mode="before")
    @classmethod
    def _one_origin(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        source, rows = values.get("source"), values.get("rows")
        if source is None and values.get("args"):
            raise ValueError("`args` are for a function that `source` names")
        if source is not None and values.get("path") == source_path(source):  # as a run's config records it
            return values
        if sum(values.get(key) is not None for key in ("path", "source", "rows")) > 1:
            raise ValueError("give only one of `path` (files), `source` (a function) and `rows` (a list of dicts)")
        if source is not None:
            return {**values, "path": source_path(source)}
        if "rows" not in values:
            return values
        rows = plain_rows(rows)  # type: ignore[arg-type]
        return {**values, "rows": rows, "path": rows_path(rows)}


def source_name(path: str) -> str:
    """What a source is called by default: its file or folder without suffixes, or the folder above a glob."""
    if path.startswith(ROWS_PREFIX):
        return "rows"
    parts = [part for part in path.split("/") if part and not set(part) & set("*?[")]
    name = parts[-1] if parts else "data"
    for suffix in (".gz", ".zst", ".jsonl", ".json", ".parquet"):
        name = name.removesuffix(suffix)
    return name


# The tag picks one branch, so that a fault is reported for what the user wrote and not for both.
Sources = Annotated[
    Annotated[SourceSection, Tag("<one>")] | Annotated[list[SourceSection], Tag("<mixture>")],
    Discriminator(lambda value: "<mixture>" if isinstance(value, list) else "<one>"),
]


def _iso_date(value: Any) -> Any:
    return date.fromisoformat(value).isoformat() if isinstance(value, str) else value and value.isoformat()


class DataSection(Section):
    train: Sources
    eval: Sources | None = None
    max_length: PositiveInt = 2048  # tokens of the longest example
    row_length: PositiveInt | None = None  # T: tokens of a packed row; default: max_length for each example of a bundle
    overlong: Literal["truncate", "drop", "split", "keep_completion"] = "truncate"  # the last cuts prompts on the left
    on_bad_row: Literal["error", "skip"] = "error"
    loss_on: Literal["assistant", "last", "all"] = "assistant"  # `last`: its last turn alone; `all`: prompts too
    merge: list[Literal["turns", "system"]] = []  # join turns of one role in a row; join system messages to the user's
    prompt_format: Literal["chat", "plain"] = "chat"  # what a prompt and a completion that are strings become
    # whether each turn of the assistant is an example of its own; False: one example, also where the chat template
    # leaves out the thoughts of earlier turns, which is an error by default
    split_turns: bool | None = None
    chat_template_kwargs: dict[str, Any] = {}  # arguments of the chat template, which a row's own override
    # year-month-day: today for chat templates that write it; default: the day on which the run began
    date: Annotated[str | None, BeforeValidator(_iso_date), MayChange(lambda old, new, config: new is None)] = None
    packing: bool = True  # False: one example a row, padded
    packing_bins: PositiveInt = 16  # open rows of a virtual shard: more pack denser and start later
    virtual_shards: PositiveInt | None = None  # default: the largest power of two up to 8 that divides train.batch_size
    # `blocks`: blocks of neighbouring rows, and the rows of a few of them, for Parquet and compressed or remote files
    # that are larger than memory
    shuffle: bool | Literal["blocks"] = True
    workers: Annotated[PositiveInt, MAY_CHANGE] = 2  # threads that read and tokenise
    # worker processes that tokenise in place of the threads, which share one interpreter lock; 0: none
    processes: Annotated[NonNegativeInt, MAY_CHANGE] = 0

    @model_validator(mode="after")
    def _a_completion_to_keep(self) -> DataSection:
        if self.overlong == "keep_completion" and self.loss_on == "all":
            raise ValueError(
                "overlong=keep_completion cuts prompts, and loss_on=all trains on them: there is no completion"
            )
        return self

    def tokens_per_row(self, bundle_size: int = 1) -> int:
        """T, where an objective reads `bundle_size` examples together. Raises ValueError if the longest do not fit."""
        needed = self.max_length * bundle_size
        if self.row_length is not None and self.row_length < needed:
            raise ValueError(
                f"data.row_length={self.row_length} is less than {needed}: a row must have room for {bundle_size} of "
                f"data.max_length={self.max_length} tokens"
            )
        return self.row_length or needed

    @property
    def train_sources(self) -> list[SourceSection]:
        return self.train if isinstance(self.train, list) else [self.train]

    @property
    def eval_sources(self) -> list[SourceSection]:
        """None at all where there is no `eval`."""
        return self.eval if isinstance(self.eval, list) else [] if self.eval is None else [self.eval]

    @property
    def eval_names(self) -> list[str]:
        """Of the sources of `eval`, each once."""
        return [source.name or source_name(source.path) for source in self.eval_sources]

    @model_validator(mode="after")
    def _names_tell_apart(self) -> DataSection:
        if twice := [name for name, count in Counter(self.eval_names).items() if count > 1]:
            raise ValueError(f"two sources of data.eval are called {twice[0]!r}: give each a `name`")
        return self


def _longer_at_a_constant_rate(old: int | None, new: int | None, config: Any) -> bool:
    if old is None or new is None or config.optimizer.warmup_ratio:
        return False
    return new > old and config.optimizer.schedule == "constant"


class ReferenceSection(Section):
    """The model whose log-probabilities a preference objective compares the policy's with."""

    # another checkpoint with the same tokenizer; default: the model that the run starts from
    path: Annotated[str | None, INPUT_PATH] = None
    # the last so many devices hold it, and the policy trains on the others; 0: it shares the policy's
    devices: Annotated[NonNegativeInt, MAY_CHANGE] = 0
    # a folder for log-probabilities of all rows, which are computed once: the weights are then not in memory
    cache: Annotated[str | None, MAY_CHANGE] = None

    @model_validator(mode="after")
    def _one_place(self) -> ReferenceSection:
        if self.cache is not None and self.devices:
            raise ValueError("with `cache` no device holds the reference during training: leave `devices` out")
        return self


class TrainSection(Section):
    """A run is given by exactly one of `steps` and `epochs`, or by neither where every source has its own `epochs`.

    At a constant rate a run of more steps may be resumed; other schedules depend on the number of steps.
    """

    steps: Annotated[PositiveInt | None, MayChange(_longer_at_a_constant_rate)] = None  # optimizer steps
    # passes over data.train; more of them later end at other steps, since the rows at the old end are padded
    epochs: PositiveFloat | None = None
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
    learning_rate: PositiveFloat = 2e-5  # recipes preference and rl: 1e-6
    schedule: Annotated[str, _one_of_or_path("constant", "linear", "cosine")] = "cosine"  # or package.module:function
    warmup_steps: NonNegativeInt = 0
    warmup_ratio: Fraction = 0.0  # instead of warmup_steps: as a share of the run's steps, rounded up
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
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"give either warmup_steps={self.warmup_steps} or warmup_ratio={self.warmup_ratio}, and 0 for the other"
            )
        return self

    def for_steps(self, steps: int) -> OptimizerSection:
        """The section of a run of `steps` steps: its warm-up as a number of steps."""
        if not self.warmup_ratio:
            return self
        return self.model_copy(update={"warmup_steps": math.ceil(self.warmup_ratio * steps), "warmup_ratio": 0.0})


class MeshSection(Section):
    preset: Literal["fsdp", "fsdp_tensor", "fsdp_expert"] = "fsdp"  # how parameters lie on the axes
    data: PositiveInt = 1  # replicas
    fsdp: Annotated[
        int, AfterValidator(_size_or_rest)
    ] = -1  # parameters and rows are split; -1: all devices that are left
    expert: PositiveInt = 1  # experts and rows are split
    context: PositiveInt = 1  # the tokens of a row are split, and parameters as over fsdp
    tensor: PositiveInt = 1  # heads, hidden width and vocabulary are split


class CallbackSection(Section):
    every: PositiveInt  # steps, and once more after the last one
    function: Given  # package.module:name or file.py:name, or the function itself; it is called with the Session
