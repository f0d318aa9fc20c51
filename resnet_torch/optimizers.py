"""PyTorch's optimisers with the update that common/training/recipe.py defines."""

from typing import Any

from common.architectures import Spec
from common.training.recipe import TrainingRecipe
from resnet_torch import framework

with framework():
    import torch
    from torch import nn
    from torch.nn.utils import get_total_norm
    from torch.optim import SGD, Adam, AdamW, Optimizer

    from resnet_torch.weights import slots

# What an optimiser keeps for every parameter, and what the recipe calls it.
MOMENTS = {"sgd": {"momentum_buffer": "velocity"}, "adamw": {"exp_avg": "moment1", "exp_avg_sq": "moment2"}}


def make(model: nn.Module, spec: Spec, recipe: TrainingRecipe, *, fused: bool | None) -> Optimizer:
    """PyTorch's own optimiser with the recipe's update, its state at zero.

    `fused` ones take one pass over memory, and read gradients and moments in the order of the parameter's own memory.
    """
    kernels = {slot.native for name, slot in slots(spec).items() if name.endswith(".kernel")}
    decayed = [p for name, p in model.named_parameters() if name in kernels]
    others = [p for name, p in model.named_parameters() if name not in kernels]
    decays = (recipe.weight_decay, recipe.weight_decay if recipe.decay_norms_and_biases else 0.0)
    coupled = recipe.optimizer == "adamw" or recipe.decay == "coupled"
    groups = [
        {"params": parameters, "weight_decay": decay if coupled else 0.0, "decoupled_decay": decay}
        for parameters, decay in zip((decayed, others), decays, strict=True)
    ]
    optimizer: Optimizer
    if recipe.optimizer == "adamw":
        # What is called Adam differs from AdamW in nothing but that its decay is coupled.
        kind = AdamW if recipe.decay == "decoupled" else Adam
        optimizer = kind(groups, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=fused)
    else:
        optimizer = SGD(groups, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=fused)
        if recipe.decay == "decoupled":
            optimizer.register_step_pre_hook(_decay)
    # What the first step would make, at zero: a state is complete before it too.
    keys = MOMENTS[recipe.optimizer] if recipe.optimizer == "adamw" or recipe.momentum else {}
    for parameter in model.parameters():
        state = {key: torch.zeros_like(parameter, requires_grad=False) for key in keys}
        if recipe.optimizer == "adamw":
            state["step"] = torch.zeros((), device=parameter.device if fused else None)
        optimizer.state[parameter] = state
    return optimizer


@torch.no_grad()
def _decay(optimizer: Optimizer, *arguments: Any) -> None:
    """Decoupled decay for SGD, as AdamW does it."""
    for group in optimizer.param_groups:
        for parameter in (p for p in group["params"] if p.grad is not None):
            parameter.mul_(1 - group["lr"] * group["decoupled_decay"])


@torch.no_grad()
def clip(model: nn.Module, limit: float) -> None:
    """As `clip_grad_norm_`, but for the 1e-6 that it adds to the norm."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    scale = limit / get_total_norm(gradients).clamp(min=limit)
    for gradient in gradients:
        gradient.mul_(scale)
