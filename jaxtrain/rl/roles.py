"""The roles of reinforcement learning beside the policy: the critic and the reference."""

from __future__ import annotations

from dataclasses import replace

from jaxtrain.lora import join
from jaxtrain.nn.heads import SCALAR
from jaxtrain.objectives.value import ClippedValue
from jaxtrain.roles.initial import adapter_params, initial_params
from jaxtrain.roles.role import Role, TrainedRole
from jaxtrain.session.session import Session


def critic_role(session: Session) -> TrainedRole:
    """PPO's value model: the policy's checkpoint with a scalar head, and a learning rate of its own."""
    config = session.config
    assert config.rl is not None
    return session.trained_role(
        "critic",
        ClippedValue(config.rl.critic.epsilon),
        model=config.model.model_copy(update={"head": SCALAR}),
        optimizer=config.optimizer.model_copy(update={"learning_rate": config.rl.critic.learning_rate}),
    )


def reference_role(policy: TrainedRole) -> Role:
    """The model that the run started from, which the KL is measured to; the same in a resumed run.

    Under LoRA it shares the policy's frozen weights and has the adapters of `model.lora.path` beside them; new
    adapters, which leave the base's function unchanged, are left out. Otherwise it has a copy of all parameters.
    """
    section, declared = policy.section, policy.declared
    if not policy.model.base_frozen:
        adapters, base = initial_params(section, declared, policy.seed)
        return Role("reference", section, declared, policy.seed, join(adapters, base))
    if section.lora is not None and section.lora.path is not None:
        adapters = adapter_params(section, declared, policy.seed, policy.frozen)
        return Role("reference", section, declared, policy.seed, join(adapters, policy.frozen))
    bare = declared._replace(model=replace(policy.model, lora=None, new_tokens=None))
    return Role("reference", section, bare, policy.seed, policy.frozen)
