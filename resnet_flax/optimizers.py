"""The optimiser of a recipe as a chain of optax transformations, and what its arrays are called outside."""

from typing import Any

from common.architectures import Spec
from common.training.recipe import TrainingRecipe
from resnet_flax import framework

with framework():
    import optax  # type: ignore[import-untyped]
    from flax.traverse_util import path_aware_map

    from resnet_flax.weights import variable_paths

# By optimiser, optax's name of an array that it keeps of every parameter, and the recipe's.
MOMENTS = {"sgd": {"trace": "velocity"}, "adamw": {"mu": "moment1", "nu": "moment2"}}


def optimizer(recipe: TrainingRecipe, spec: Spec) -> optax.GradientTransformation:
    """The updates that common/training/recipe.py defines, at the learning rate in the ``hyperparams`` of the state."""
    native = variable_paths(spec)
    # Their gradient is zero here, and what has none does not decay either.
    unused = {native[name][1:] for layer in spec.layers if layer.unused for name in layer.parameters}

    def decays(path: Any, _: Any) -> bool:
        return path not in unused and (recipe.decay_norms_and_biases or path[-1] == "kernel")

    def decaying(params: Any) -> Any:
        return path_aware_map(decays, params)

    decay = optax.add_decayed_weights(recipe.weight_decay, mask=decaying)
    if recipe.optimizer == "adamw":
        rule = optax.scale_by_adam(recipe.beta1, recipe.beta2, recipe.eps)
    else:
        # Without momentum a velocity would be the gradient, kept for nothing.
        rule = optax.trace(recipe.momentum, recipe.nesterov) if recipe.momentum else optax.identity()

    @optax.inject_hyperparams  # type: ignore[untyped-decorator]
    def updates(learning_rate: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.identity() if recipe.clip_norm is None else optax.clip_by_global_norm(recipe.clip_norm),
            # Decay after the rule is scaled by the learning rate alone, before it goes into the moments too.
            *((decay, rule) if recipe.decay == "coupled" else (rule, decay)),
            optax.scale_by_learning_rate(learning_rate),
        )

    return updates(learning_rate=recipe.learning_rate)
