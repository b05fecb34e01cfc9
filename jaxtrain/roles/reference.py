"""The reference: the model that a run starts from."""

from dataclasses import replace

from jaxtrain.lora import join
from jaxtrain.roles.declare import Declaration
from jaxtrain.roles.initial import adapter_params, full_params, initial_params
from jaxtrain.roles.role import Role, TrainedRole


def reference_role(policy: TrainedRole) -> Role:
    """The reference of the KL: the initial model of the run, also after a resume.

    Under LoRA it shares the policy's frozen weights, together with the adapters of `model.lora.path` if given (new
    adapters would not change its outputs), and has a copy of the initial values of what the policy trains in full.
    Otherwise it has a copy of all parameters.
    """
    section, declared = policy.section, policy.declared
    if not policy.model.base_frozen:
        adapters, base = initial_params(section, declared, policy.seed)
        return Role("reference", section, declared, policy.seed, join(adapters, base))
    if section.lora is not None and section.lora.path is not None:
        adapters = adapter_params(section, declared, policy.seed, policy.frozen)
        return Role("reference", section, declared, policy.seed, join(adapters, policy.frozen))
    bare = bare_declaration(policy)
    return Role(
        "reference", section, bare, policy.seed, join(full_params(section, declared, policy.seed), policy.frozen)
    )


def bare_declaration(policy: TrainedRole) -> Declaration:
    """That of the policy's model without adapters and rows of new tokens."""
    return policy.declared._replace(model=replace(policy.model, lora=None, new_tokens=None))
