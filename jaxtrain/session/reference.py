"""The reference of preference objectives: a frozen model, or its log-probabilities, computed once."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax

from jaxtrain.config import ModelSection, ReferenceSection, TeacherSection
from jaxtrain.data.pipeline import TrainStream
from jaxtrain.parallel.batches import move_batch
from jaxtrain.roles.reference import reference_role
from jaxtrain.roles.role import Role, TrainedRole
from jaxtrain.session.roles import RunRoles
from jaxtrain.session.session import Session
from jaxtrain.types import REF_LOGPS, Batch


def policy_devices(
    section: ReferenceSection | TeacherSection | None, devices: Sequence[Any] | None = None
) -> Sequence[Any]:
    """The devices that train: all but the last `reference.devices` or `teacher.devices`.

    `devices`: all of the run; default: those of JAX. Raises ValueError if none is left.
    """
    devices, count = jax.devices() if devices is None else devices, section.devices if section else 0
    if not count:
        return devices
    name = "teacher" if isinstance(section, TeacherSection) else "reference"
    if jax.process_count() > 1:
        raise ValueError(f"{name}.devices needs a single process: with several the {name} shares the policy's")
    if count >= len(devices):
        raise ValueError(f"{name}.devices={count} of {len(devices)} devices leaves none to train on")
    return devices[:-count]


class ReferenceLogps:
    """Adds the signal `ref_logps` to placed batches that lack it, if the objective reads it. The reference is loaded
    when it is first needed."""

    def __init__(self, session: Session, policy: TrainedRole):
        self._session, self._policy = session, policy
        self._needed = REF_LOGPS in session.config.objective.signals

    @property
    def other(self) -> Role | None:
        """A reference that is not the model that the run starts from, declared and not loaded."""
        section = self._session.config.reference
        if not self._needed or section is None or section.path is None:
            return None
        return other_reference(self._session, self._policy)

    def load_for(self, stream: TrainStream) -> None:
        """Load the reference now, so that a wrong one is an error at the start, unless the data has the signal."""
        if self._needed and REF_LOGPS not in stream.signals:
            assert self.role

    def __call__(self, batch: Batch) -> Batch:
        if not self._needed or REF_LOGPS in batch.signals:
            return batch
        logps = move_batch(self.role.logps(batch), self._policy.mesh)
        return batch._replace(signals={**batch.signals, REF_LOGPS: logps})

    @cached_property
    def role(self) -> Role:
        return load_reference(self._session, self._policy)


def load_reference(session: Session, policy: TrainedRole) -> Role:
    """The model of `reference.path`, or the one that the run starts from, on its own devices if it has any.

    Raises ValueError for one with other token ids than the policy.
    """
    section = session.config.reference or ReferenceSection()
    if not section.devices and section.path is None and policy.restored:
        return reference_role(policy)
    role = other_reference(session, policy)
    both = (role.tokenizer, session.tokenizer)
    if section.path is not None and None not in both and both[0].get_vocab() != both[1].get_vocab():
        raise ValueError(f"reference.path={section.path} has another tokenizer than the policy")
    role.load()
    return role


def reference_section(policy: ModelSection, path: str) -> ModelSection:
    """The reference at `path`, with what of the policy's section does not belong to its checkpoint."""
    other = dict.fromkeys(("config", "tokenizer", "add_tokens", "lora", "quantize"))
    return policy.model_copy(update={**other, "path": path})


def other_reference(roles: RunRoles, policy: TrainedRole) -> Role:
    """A reference that has its own parameters, declared and not loaded."""
    section = roles.config.reference or ReferenceSection()
    model = policy.section if section.path is None else reference_section(policy.section, section.path)
    return roles.role("reference", model, roles.frozen_mesh(section.devices) if section.devices else policy.mesh)
