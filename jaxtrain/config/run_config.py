"""The tree of a run: all sections, and what must fit together between them."""

from __future__ import annotations

from dataclasses import replace
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, ValidationInfo, field_validator, model_validator

from jaxtrain.config.data import DataSection
from jaxtrain.config.dataclass_sections import OBJECTIVE, SAMPLING, resolve_algorithm, resolve_objective
from jaxtrain.config.distributed import DistributedSection
from jaxtrain.config.evaluation import EvalSection
from jaxtrain.config.marks import MAY_CHANGE
from jaxtrain.config.model import ModelSection
from jaxtrain.config.outputs import CheckpointSection, LogSection
from jaxtrain.config.rl import RLSection
from jaxtrain.config.sections import (
    CallbackSection,
    MeshSection,
    OptimizerSection,
    ReferenceSection,
    RunSection,
    Section,
    TrainSection,
)
from jaxtrain.config.teacher import TeacherSection, check_teacher
from jaxtrain.types import GROUP_PLACE

_PRESETS = {  # the objective of each recipe, unless `objective.name` is set
    "sft": "jaxtrain.objectives:SFT",
    "preference": "jaxtrain.objectives:DPO",
    "reward": "jaxtrain.objectives:BradleyTerry",
    "distill": "jaxtrain.objectives:Distill",
}
_SMALL_UPDATES = 1e-6  # TRL's learning rate of DPO, KTO and GRPO: the default of these recipes
_NO_TEXT = "a reward model does not generate text"
# Keys that mean nothing to a recipe, and what does instead.
_NOT_FOR: dict[str, dict[str, str]] = {
    "sft": {},
    "preference": {},
    "distill": {},
    "reward": {"eval.generate": _NO_TEXT, "eval.max_new_tokens": _NO_TEXT},
    "rl": {
        "train.batch_size": "rl.prompts x rl.generations samples make a step",
        "data.overlong": "a prompt that is too long is a bad row: data.on_bad_row",
        "data.loss_on": "what the model writes is trained on",
        "data.packing": "samples are always packed",
        "data.packing_bins": "samples are always packed as densely as they can be",
        "data.virtual_shards": "one process reads all prompts",
        "data.workers": "one thread reads the prompts",
        "eval.batches": "eval.generate is the number of held-out prompts",
    },
}

SamplingSection = Annotated[Any, SAMPLING, PlainSerializer(lambda value: value and SAMPLING.section(value))]
ObjectiveSection = Annotated[Any, OBJECTIVE, PlainSerializer(OBJECTIVE.section)]


class RunConfig(Section):
    recipe: Literal["sft", "preference", "reward", "distill", "rl"]
    """What is trained: texts, pairs, a reward model, a student of a teacher, or samples of the model itself."""
    run: RunSection = RunSection()
    """The folder and the seed of the run."""
    model: ModelSection
    """The model that is trained."""
    data: DataSection
    """What it is trained and evaluated on."""
    train: TrainSection = TrainSection()
    """How long, and in which batches."""
    optimizer: OptimizerSection = OptimizerSection()
    """The optimizer and its learning rate."""
    mesh: Annotated[MeshSection, MAY_CHANGE] = MeshSection()
    """How many devices each axis of the mesh has."""
    checkpoint: Annotated[CheckpointSection, MAY_CHANGE] = CheckpointSection()
    """When checkpoints are saved, and which are kept."""
    eval: EvalSection = EvalSection()
    """What is measured on held-out data."""
    log: Annotated[LogSection, MAY_CHANGE] = LogSection()
    """What is logged, and how often."""
    distributed: Annotated[DistributedSection, MAY_CHANGE] = DistributedSection()
    """Timeouts of several processes."""
    callbacks: Annotated[list[CallbackSection], MAY_CHANGE] = Field(default_factory=list)
    """Functions that are called with the session every so many steps."""
    reference: ReferenceSection | None = None
    """Of recipe preference: the model that the policy is compared with."""
    teacher: TeacherSection | None = None
    """Of recipe distill, and of recipe rl with an algorithm that has a teacher."""
    rl: RLSection | None = None
    """Of recipe rl: what is sampled, how it is scored, and how it is learned from."""
    sampling: SamplingSection = Field(default=None, validate_default=True)
    """Of the rollouts of recipe rl: the fields of `SamplingParams` (jaxtrain.sample.requests)."""
    objective: ObjectiveSection = Field(default={}, validate_default=True)
    """{name: a class of jaxtrain.objectives, package.module:Class or file.py:Class, and values for its fields};
    default: SFT, DPO, BradleyTerry, Distill, or that of rl.algorithm."""

    @model_validator(mode="before")
    @classmethod
    def _with_context(cls, tree: Any) -> Any:
        """`objective` is checked against that of `rl.algorithm`, whatever else may be wrong in `rl`. A reward model has
        a scalar head. Preferences and rewards need smaller updates than texts.
        """
        if isinstance(tree, dict) and tree.get("recipe") in ("preference", "rl"):
            optimizer = tree.get("optimizer", {})
            if isinstance(optimizer, dict):
                tree = {**tree, "optimizer": {"learning_rate": _SMALL_UPDATES, **optimizer}}
        if isinstance(tree, dict) and tree.get("recipe") == "reward" and isinstance(model := tree.get("model"), dict):
            tree = {**tree, "model": {"head": "scalar", **model}}
        if not isinstance(tree, dict) or not isinstance(rl := tree.get("rl"), dict):
            return tree
        algorithm = rl.get("algorithm", RLSection.model_fields["algorithm"].default)
        return {**tree, "objective": (tree.get("objective", {}), algorithm)}

    @field_validator("sampling", mode="before")
    @classmethod
    def _sampling(cls, given: Any, info: ValidationInfo) -> Any:
        if info.data.get("recipe") == "rl":
            return SAMPLING.apply(resolve_name(SAMPLING.path)(), {} if given is None else given)
        if given is not None:
            raise ValueError(f"recipe {info.data.get('recipe')} draws no samples that it trains on; leave it out")
        return None

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, given: Any, info: ValidationInfo) -> Any:
        given, algorithm = given if isinstance(given, tuple) else (given, None)
        if (recipe := info.data.get("recipe")) in _PRESETS:
            cached = getattr(info.data.get("teacher"), "cache", None) is not None
            made = resolve_objective(given, recipe, resolve_name(_PRESETS[recipe])())
            return replace(made, sparse=cached) if hasattr(made, "sparse") else made
        try:
            preset = resolve_algorithm(algorithm)
        except ValueError:
            return given  # `rl`, or its key `algorithm`, is refused
        objective = resolve_objective(given, "rl", preset.objective)
        rl, sampling = info.data.get("rl"), info.data.get("sampling")
        if rl is None or sampling is None or not sampling.temperature:
            return objective  # which are refused
        if preset.advantages is None:
            return objective  # a divergence, which has a temperature of its own
        return replace(objective, max_completion_length=rl.max_completion_length, temperature=sampling.temperature)

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        self._check_one_length()
        if self.eval.generate and self.data.eval is None and self.eval.prompts is None:
            raise ValueError("eval.generate needs data.eval or eval.prompts")
        if self.rl is not None and self.data.eval is not None and not self.eval.generate:
            raise ValueError(
                "recipe rl reads data.eval only for eval.generate, the number of held-out prompts to answer"
            )
        if (self.recipe == "rl") != (self.rl is not None):
            raise ValueError("`recipe: rl` and the section `rl` belong together")
        check_teacher(self.recipe, self.teacher, self.rl)
        self._check_context()
        self._check_rounding()
        if self.teacher is not None and self.teacher.cache is not None and GROUP_PLACE in self.objective.signals:
            raise ValueError(
                "teacher.cache holds log-probabilities of the student's own ids, which objectives for a teacher with "
                "another tokenizer do not read: leave it out"
            )
        for section, names in self.unused.items():
            for name in names & getattr(self, section).model_fields_set:
                reason = _NOT_FOR[self.recipe][f"{section}.{name}"]
                raise ValueError(f"recipe {self.recipe} has no {section}.{name}: {reason}")
        if self.recipe in ("preference", "reward"):
            self._check_answers()
        if self.reference is not None and not getattr(self.objective, "has_reference", False):
            raise ValueError(f"`reference` has no effect with recipe {self.recipe} and this objective: leave it out")
        if self.recipe != "rl" and self.train.batch_size % self.train.microbatches:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} is not a multiple of "
                f"train.microbatches={self.train.microbatches}"
            )
        if self.rl is not None and self.model.lora is not None and self.model.lora.dropout:
            raise ValueError(
                f"model.lora.dropout={self.model.lora.dropout} must be 0 with recipe rl: the sampler and the old "
                "log-probabilities are without dropout, so that the first update would not have a ratio of 1"
            )
        if self.rl is not None and self.rl.max_completion_length >= self.data.max_length:
            raise ValueError(
                f"rl.max_completion_length={self.rl.max_completion_length} leaves no room for a prompt in "
                f"data.max_length={self.data.max_length}"
            )
        if self.rl is not None:
            assert self.algorithm  # raises ValueError if the algorithm and the objective do not fit together
            self._check_sampling(self.rl)
        return self

    def _check_rounding(self) -> None:
        model = self.model
        trained = model.param_dtype if model.lora is None else model.lora.dtype
        if self.optimizer.rounding == "stochastic" and trained != "bfloat16":
            key = "model.param_dtype" if model.lora is None else "model.lora.dtype"
            raise ValueError(
                f"optimizer.rounding=stochastic is for parameters in bfloat16, and {key}={trained}: use bfloat16, or "
                "rounding=nearest"
            )

    def _check_context(self) -> None:
        """The engine keeps whole samples on a device, or splits their heads."""
        reader = "recipe rl" if self.rl is not None else "eval.generate" if self.eval.generate else None
        if self.mesh.context > 1 and reader:
            raise ValueError(
                f"mesh.context={self.mesh.context} splits the tokens of rows, which the engine that {reader} samples "
                "with does not: set it to 1"
            )

    def _check_answers(self) -> None:
        """An answer has one score, so that it cannot be cut into parts."""
        data = self.data
        for key, wrong in (("overlong", "split"), ("loss_on", "all"), ("split_turns", True)):
            if getattr(data, key) == wrong:
                raise ValueError(
                    f"data.{key}={wrong} does not go with recipe {self.recipe}, which compares whole answers"
                )

    def _check_sampling(self, rl: RLSection) -> None:
        if not self.sampling.temperature:
            raise ValueError("sampling.temperature=0 is greedy: a policy gradient needs samples, so give more than 0")
        if self.sampling.top_k > rl.support:
            raise ValueError(
                f"sampling.top_k={self.sampling.top_k} is more than rl.support={rl.support}, the number of tokens that "
                "the trainer scores a sample among: raise rl.support, or lower top_k"
            )
        if self.sampling.min_tokens > rl.max_completion_length:
            raise ValueError(
                f"sampling.min_tokens={self.sampling.min_tokens} is more than "
                f"rl.max_completion_length={rl.max_completion_length}"
            )
        if rl.placement.staleness and rl.algorithm.advantages and self.objective.correction is None:
            raise ValueError(
                f"rl.placement.staleness={rl.placement.staleness} needs objective.correction: nothing else bounds the "
                "weight of samples drawn from older weights (the clip is around the trainer's own log-probabilities)"
            )

    @property
    def algorithm(self) -> Any:
        """The Algorithm of recipe rl, with the run's own objective."""
        assert self.rl is not None
        return replace(self.rl.algorithm, objective=self.objective)

    def check_length(self) -> None:
        """Raise ValueError where the length of the run is not given, as a config that is not run may leave it."""
        endless = [source.path for source in self.data.train_sources if source.epochs is None]
        if self.train.steps is None and self.train.epochs is None and endless:
            raise ValueError(
                "give train.steps or train.epochs: the length of the run is unknown, since data.train "
                f"({endless[0]}) is read over and over"
            )

    def _check_one_length(self) -> None:
        steps, epochs, sources = self.train.steps, self.train.epochs, self.data.train_sources
        if steps is not None and epochs is not None:
            raise ValueError(
                f"give either train.steps={steps} or train.epochs={epochs:g}, and null for the other: one of them is "
                "the length of the run"
            )
        finite = [source.epochs for source in sources if source.epochs is not None]
        if epochs is not None and finite:
            raise ValueError(
                f"train.epochs={epochs:g} passes over the whole mixture, and epochs={finite[0]} of a source in "
                "data.train would end that source alone: give only one of the two"
            )
        if steps is not None and self.optimizer.warmup_steps > steps:
            raise ValueError(f"optimizer.warmup_steps={self.optimizer.warmup_steps} is more than train.steps={steps}")

    @property
    def unused(self) -> dict[str, set[str]]:
        """Section -> the keys of it that the recipe has no use for; giving one is a mistake."""
        unused: dict[str, set[str]] = {}
        for key in _NOT_FOR[self.recipe]:
            section, _, name = key.partition(".")
            unused.setdefault(section, set()).add(name)
        return unused
