"""Small sections of a run: its folder, optimizer, mesh and so on, and the types that all sections share."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from jaxtrain.config.marks import IN_HOME, INPUT_PATH, MAY_CHANGE, MayChange
from jaxtrain.config.python_values import Importable, check_importable

NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
DType = Literal["float32", "bfloat16", "float16"]


def _size_or_rest(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("should be greater than 0, or -1 for all devices that are left")
    return value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class RunSection(Section):
    dir: Annotated[str, MAY_CHANGE, IN_HOME] = "runs/default"
    """Everything the run writes; a folder or a URL."""
    seed: NonNegativeInt = 0
    """Of the order of the data, of initial weights, of dropout and of sampling."""


def _longer_at_a_constant_rate(old: int | None, new: int | None, config: Any) -> bool:
    if old is None or new is None or config.optimizer.warmup_ratio:
        return False
    return new > old and config.optimizer.schedule == "constant"


class ReferenceSection(Section):
    """The model whose log-probabilities a preference objective compares the policy's with."""

    path: Annotated[str | None, INPUT_PATH, IN_HOME] = None
    """Another checkpoint with the same tokenizer; default: the model that the run starts from."""
    devices: Annotated[NonNegativeInt, MAY_CHANGE] = 0
    """The last so many devices hold it, and the policy trains on the others; 0: it shares the policy's."""
    cache: Annotated[str | None, MAY_CHANGE, IN_HOME] = None
    """A folder for log-probabilities of all rows, which are computed once: the weights are then not in memory."""

    @model_validator(mode="after")
    def _one_place(self) -> ReferenceSection:
        if self.cache is not None and self.devices:
            raise ValueError("with `cache` no device holds the reference during training: leave `devices` out")
        return self


class TrainSection(Section):
    """A run is given by exactly one of `steps` and `epochs`, or by neither where every source has its own `epochs`.

    At a constant rate a run of more steps may be resumed; other schedules depend on the number of steps.
    """

    steps: Annotated[PositiveInt | None, MayChange(_longer_at_a_constant_rate)] = None
    """Optimizer steps."""
    epochs: PositiveFloat | None = None
    """Passes over data.train; more of them later end at other steps, since the rows at the old end are padded."""
    batch_size: PositiveInt = 8
    """Packed rows of the global batch; recipe rl: as many as a step's samples fill."""
    microbatches: Annotated[PositiveInt, MAY_CHANGE] = 1
    """The batch is computed in this many pieces (gradient accumulation)."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this norm; null: never."""
    max_skipped_in_a_row: Annotated[PositiveInt, MAY_CHANGE] = 5
    """Non-finite gradients in a row that end the run."""


def _one_of_or_path(*known: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in known and ":" not in value:
            raise ValueError(f"should be one of {', '.join(known)}, or package.module:function, not {value!r}")
        return value if value in known else check_importable(value)

    return AfterValidator(check)


class OptimizerSection(Section):
    name: Annotated[str, _one_of_or_path("adamw", "adafactor", "muon")] = "adamw"
    """`adamw`, `adafactor`, `muon`, or package.module:function."""
    learning_rate: PositiveFloat = 2e-5
    """The highest of the schedule; default of recipes preference and rl: 1e-6."""
    schedule: Annotated[str, _one_of_or_path("constant", "linear", "cosine")] = "cosine"
    """`constant`, `linear`, `cosine`, or package.module:function."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate grows to its value."""
    warmup_ratio: Fraction = 0.0
    """Instead of warmup_steps: as a share of the run's steps, rounded up."""
    final_learning_rate: Fraction = 0.0
    """As a share of learning_rate, where the schedule ends."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of matrices only: norms, biases and embeddings never decay."""
    b1: Fraction = 0.9
    """Decay of the gradient's running mean."""
    b2: Fraction = 0.999
    """Decay of the squared gradient's running mean."""
    eps: PositiveFloat = 1e-8
    """Added to the divisor of an update."""
    state_dtype: DType = "float32"
    """Of the first moment."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Of updates of parameters in bfloat16 (model.param_dtype); stochastic: the optimizer computes in float32, and
    small updates are not lost."""
    args: dict[str, Any] = {}
    """Read by a function that `name` or `schedule` names by import path."""

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
    preset: Literal["fsdp", "fsdp_tensor", "fsdp_expert"] = "fsdp"
    """How parameters lie on the axes."""
    data: PositiveInt = 1
    """Replicas."""
    fsdp: Annotated[int, AfterValidator(_size_or_rest)] = -1
    """Parameters and rows are split; -1: all devices that are left."""
    expert: PositiveInt = 1
    """Experts and rows are split."""
    context: PositiveInt = 1
    """The tokens of a row are split, and parameters as over fsdp."""
    tensor: PositiveInt = 1
    """Heads, hidden width and vocabulary are split."""


class CallbackSection(Section):
    every: PositiveInt
    """Steps, and once more after the last one."""
    function: Importable
    """package.module:name or file.py:name, or the function itself; it is called with the Session."""
