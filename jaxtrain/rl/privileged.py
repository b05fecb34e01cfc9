"""Privileged prompts: what a teacher reads in place of the student's prompt, with more of the row in it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtrain.config.teacher import PROMPT, template_fields
from jaxtrain.data.encoder import RowEncoder
from jaxtrain.data.messages import question
from jaxtrain.data.sources import Row
from jaxtrain.rl.rollouts import Prompt
from jaxtrain.roles.role import Role
from jaxtrain.session.session import Session


class PrivilegedPrompts:
    """Fills a template with the columns of a row and puts it in place of the user's last message, or of a prompt that
    is a string."""

    def __init__(self, template: str, encode: RowEncoder):
        """`template`: `teacher.privileged_prompt`. `encode`: the student's, for a teacher with the same token ids."""
        self._template, self._encode = template, encode
        self._fields = [name for name in dict.fromkeys(template_fields(template)) if name != PROMPT]

    def row(self, columns: Mapping[str, Any]) -> Row:
        """The row with the teacher's `prompt`. `columns`: those of a `Prompt`.

        Raises ValueError for a row without a column of the template, or without a message of the user.
        """
        values: dict[str, str] = {}
        for name in self._fields:
            value = columns.get(name)
            if not isinstance(value, str | int | float):
                problem = f"is {type(value).__name__}, and not text or a number" if name in columns else "is missing"
                raise ValueError(
                    f"teacher.privileged_prompt reads the column {name!r}, which {problem}: this row has "
                    f"{', '.join(map(repr, columns))}"
                )
            values[name] = str(value)
        prompt = columns["prompt"]
        if isinstance(prompt, str):
            return {**columns, "prompt": self._template.format_map({**values, PROMPT: prompt})}
        messages = question(dict(columns)).messages
        asked = [number for number, message in enumerate(messages) if message["role"] == "user"]
        if not asked:
            raise ValueError("teacher.privileged_prompt replaces the user's last message, and this prompt has none")
        last = messages[asked[-1]]
        text = self._template.format_map({**values, PROMPT: last["content"]})
        messages = [*messages[: asked[-1]], last | {"content": text}, *messages[asked[-1] + 1 :]]
        return {**columns, "prompt": messages, "system": None}  # the column `system` is among the messages

    def __call__(self, prompt: Prompt) -> Prompt:
        """The prompt with the ids that the teacher reads. Raises ValueError as `row`."""
        ids, _ = self._encode.question(self.row(prompt.columns))
        return prompt._replace(ids=ids.astype(np.int32))


def privileged_prompts(session: Session, policy: Role) -> PrivilegedPrompts | None:
    """Those of `teacher.privileged_prompt`, or None."""
    section = session.config.teacher
    if section is None or section.privileged_prompt is None:
        return None
    return PrivilegedPrompts(section.privileged_prompt, session.encoder(policy))
