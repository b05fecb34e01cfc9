"""The critic of reinforcement learning."""

from fnmatch import fnmatchcase

from jaxtrain.nn.heads import SCALAR
from jaxtrain.objectives.value import ClippedValue
from jaxtrain.roles.role import TrainedRole
from jaxtrain.session.roles import RunRoles


def critic_role(roles: RunRoles) -> TrainedRole:
    """PPO's value model: the policy's checkpoint with a scalar head and a separate learning rate."""
    config = roles.config
    assert config.rl is not None
    model = config.model.model_copy(update={"head": SCALAR})
    if model.lora and model.lora.modules_to_save:  # the scalar head, which is trained too, is in place of lm_head
        names = [name for name in model.lora.modules_to_save if not fnmatchcase("lm_head", name)]
        model = model.model_copy(update={"lora": model.lora.model_copy(update={"modules_to_save": names})})
    return roles.trained_role(
        "critic",
        ClippedValue(config.rl.critic.epsilon),
        model=model,
        optimizer=config.optimizer.model_copy(update={"learning_rate": config.rl.critic.learning_rate}),
    )
