"""Reward models: models with a scalar head that score a prompt with its completion."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from converters.families.registry import has_scalar_head
from jaxtrain.data.turn_ends import closing_ids, turn_end_ids
from jaxtrain.nn.heads import SCALAR
from jaxtrain.parallel.batches import host_rows, local_row_shares
from jaxtrain.rl.rollouts import Trajectory, pack_parts
from jaxtrain.roles.role import Role
from jaxtrain.session.session import Session


class Closing:
    """Callable: a sample that ends as the chat template ends a conversation, where reward models are trained.

    After the token that a policy ends its turn with a template may write more, such as the line break of ChatML.
    Another end token than the template's is replaced, and a sample that was cut off is ended. TRL renders the text of a
    sample again, with the same end. Samples of prompts that are joined as they are (`plain`) do not change.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop_ids: Collection[int], *, plain: bool):
        """`stop_ids` end a sample of the policy."""
        self.ids, self._turn_ends = closing_ids(tokenizer), turn_end_ids(tokenizer)
        self._stop_ids, self._plain = stop_ids, plain

    def __call__(self, t: Trajectory) -> Trajectory:
        sampled = t.completion_ids.tolist()
        if (self._plain and isinstance(t.prompt.columns.get("prompt"), str)) or not sampled:
            return t
        last, closing = sampled[-1], self.ids
        if last in self._turn_ends:
            closing = [last, *closing[1:]]
        ids = np.array([*sampled[: len(sampled) - (last in self._stop_ids)], *closing], np.int32)
        return t.with_completion(ids)


class RewardModel:
    """Callable: returns the head's output at the last token of every sample, [n]. All processes call it together.

    It gets the policy's token ids, so it must have the same tokenizer.
    """

    def __init__(
        self, role: Role, weight: float, max_length: int, close: Callable[[Trajectory], Trajectory] | None = None
    ):
        """`role` has a scalar head; `close` changes the ends of samples; `max_length` is then their maximum length."""
        self.name, self.weight = role.name, weight
        self._role, self._max_length, self._close = role, max_length, close

    def __call__(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        samples = [self._close(t) for t in trajectories] if self._close else trajectories
        (packed,) = pack_parts([samples], self._max_length, local_row_shares(self._role.model.run.mesh))
        values = host_rows(self._role.rewards(packed.batch._replace(signals={})))
        return np.array([values[span.row, span.stop - 1] for span in packed.spans], np.float64)


def reward_models(session: Session, policy: Role) -> list[RewardModel]:
    """The models of `rl.reward_models`, on the trainer's devices and sharded like the policy.

    Raises ValueError for a folder that is not a reward model, or has other token ids than the policy.
    """
    config, tokenizer = session.config, session.tokenizer
    assert config.rl is not None
    others = dict.fromkeys(("config", "tokenizer", "add_tokens", "chat_template", "lora", "quantize"))
    models = []
    for section in config.rl.reward_models:
        role = session.role(
            section.name, config.model.model_copy(update={**others, "path": section.path, "head": SCALAR})
        )
        if not has_scalar_head(role.declared.hf):
            raise ValueError(
                f"rl.reward_models: {section.path} is not a reward model (a sequence classifier with one label)"
            )
        own = role.tokenizer
        if tokenizer is not None and own is not None and own.get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"rl.reward_models: {section.path} has another tokenizer than the policy")
        role.load()
        max_length, close = config.data.max_length, None
        if tokenizer is not None and tokenizer.chat_template:
            close = Closing(tokenizer, session.stop_ids(policy), plain=config.data.prompt_format == "plain")
            max_length += len(close.ids)
        models.append(RewardModel(role, section.weight, max_length, close))
    return models
