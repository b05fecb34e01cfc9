"""The section `teacher`: the model that a student is distilled from."""

from __future__ import annotations

from string import Formatter
from typing import Annotated

from pydantic import PositiveInt, model_validator

from jaxtrain.config.marks import IN_HOME, INPUT_PATH, MAY_CHANGE
from jaxtrain.config.rl import RLSection
from jaxtrain.config.sections import DType, NonNegativeInt, Section

PROMPT = "prompt"  # placeholder in `privileged_prompt` of what the student reads


class TeacherSection(Section):
    """The model that a student is distilled from."""

    path: Annotated[str | None, INPUT_PATH, IN_HOME] = None
    """A checkpoint of any size or family, with the student's token ids; default, for self-distillation with a
    `privileged_prompt`: the model that the run starts from."""
    devices: Annotated[NonNegativeInt, MAY_CHANGE] = 0
    """The last so many devices hold it, and the student trains on the others; 0: it shares the student's."""
    param_dtype: DType | None = None
    """Default: model.compute_dtype."""
    privileged_prompt: str | None = None
    """Of recipe rl: what the teacher reads in place of the user's last message, or of a plain prompt. {prompt} is
    that text and {NAME} the column NAME of the row; braces are written {{ and }}."""
    aligned: bool = False
    """Of recipe rl, algorithm on_policy_distillation: the teacher has another tokenizer, and scores the text of samples
    in its own tokens."""
    cache: Annotated[str | None, MAY_CHANGE, IN_HOME] = None
    """A folder for the `top_logps` largest log-probabilities at every token, computed once, without weights later."""
    top_logps: PositiveInt | None = None
    """Default: 64."""

    @model_validator(mode="after")
    def _fits_together(self) -> TeacherSection:
        if self.cache is not None and self.devices:
            raise ValueError("with `cache` no device holds the teacher during training: leave `devices` out")
        if self.cache is None and self.top_logps is not None:
            raise ValueError("top_logps is for `cache`: without it the divergence is over the whole vocabulary")
        if self.path is None and self.param_dtype is not None:
            raise ValueError("param_dtype is that of the checkpoint at `path`: without one the teacher is the model")
        if self.privileged_prompt is not None and PROMPT not in template_fields(self.privileged_prompt):
            raise ValueError("privileged_prompt must contain {prompt}, the text that the student reads")
        return self


def template_fields(template: str) -> list[str]:
    """The names in braces. Raises ValueError for a template with anything else in braces."""
    try:
        fields = [field for field in Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise ValueError(f"privileged_prompt: {error}; braces that are no {{NAME}} are written {{{{ and }}}}") from None
    for _, name, spec, conversion in fields:
        assert name is not None
        if not name or name.isdigit() or spec or conversion or not {".", "["}.isdisjoint(name):
            raise ValueError(
                f"privileged_prompt: {{{name}}} is not the name of a column; braces that are no {{NAME}} are written "
                "{{ and }}"
            )
    return [str(name) for _, name, _, _ in fields]


def check_teacher(recipe: str, teacher: TeacherSection | None, rl: RLSection | None) -> None:
    """Raise ValueError where the section is missing, has no effect, or has a key that does not go with the recipe."""
    if recipe != "rl" or rl is None:
        if (recipe == "distill") != (teacher is not None):
            raise ValueError("`recipe: distill` and the section `teacher` belong together")
        if teacher is not None and teacher.privileged_prompt is not None:
            raise ValueError(
                "teacher.privileged_prompt is for recipe rl: recipe distill compares the student with the teacher at "
                "the tokens that both read"
            )
        if teacher is not None and teacher.path is None:
            raise ValueError("teacher.path is missing: a checkpoint of the teacher")
        if teacher is not None and teacher.aligned:
            raise ValueError("teacher.aligned is for recipe rl: in recipe distill objective.name=ULD aligns the tokens")
        return
    algorithm = rl.algorithm
    if teacher is None:
        if algorithm.needs_teacher:
            raise ValueError(f"rl.algorithm={algorithm.name} needs the section `teacher`")
        return
    if not algorithm.needs_teacher:
        raise ValueError(
            f"`teacher` has no effect with rl.algorithm={algorithm.name}: name on_policy_distillation, gkd, "
            "gold or uld, or give a rl.algorithm.teacher_coefficient"
        )
    if teacher.cache is not None:
        raise ValueError(
            "teacher.cache is for the rows of data.train in recipe distill: the student's own samples are new in every "
            "step, so leave it out"
        )
    if teacher.devices and rl.placement.kind == "disjoint":
        raise ValueError(
            f"teacher.devices={teacher.devices} does not go with rl.placement.kind=disjoint: both are the last devices"
        )
    if teacher.aligned or algorithm.aligns:
        _check_aligned(teacher, rl)
    if teacher.privileged_prompt is not None:
        if algorithm.advantages is None and not algorithm.aligns:
            raise ValueError(
                f"teacher.privileged_prompt does not go with rl.algorithm={algorithm.name}, which compares the "
                "distributions at the tokens that both read: use on_policy_distillation"
            )
        if rl.environment is not None:
            raise ValueError(
                "teacher.privileged_prompt does not go with rl.environment, which writes the prompts itself"
            )
    elif teacher.path is None:
        raise ValueError(
            "give teacher.path, or teacher.privileged_prompt for self-distillation: without both the teacher is the "
            "model that the run starts from, which agrees with the student"
        )


def _check_aligned(teacher: TeacherSection, rl: RLSection) -> None:
    name = f"rl.algorithm={rl.algorithm.name}" if rl.algorithm.aligns else "teacher.aligned"
    if teacher.aligned and rl.algorithm.aligns:
        raise ValueError(f"teacher.aligned has no effect with {name}, which aligns the tokens itself: leave it out")
    if rl.algorithm.advantages is None and not rl.algorithm.aligns:
        raise ValueError(
            f"teacher.aligned does not go with rl.algorithm={rl.algorithm.name}, which compares distributions over the "
            "same token ids: use gold, uld or on_policy_distillation"
        )
    if rl.environment is not None:
        raise ValueError(f"{name} does not go with rl.environment, whose turns are between the model's tokens")
    if teacher.path is None:
        raise ValueError(f"{name} is for a teacher with another tokenizer: give teacher.path")
