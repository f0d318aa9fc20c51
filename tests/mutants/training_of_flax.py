"""Defects planted in how Flax trains. What each must be caught by stands in catalogue.py."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_flax import training
from tests.mutants.of_flax import default_momentum  # noqa: F401  of the layers, in training as ever
from tests.mutants.planting import replaced

_optimizer, _train_step, _fit = training.optimizer, training.train_step, training.FlaxTrainer.fit
_scale_by_adam, _trace = optax.scale_by_adam, optax.trace


def _by(**changes: Any) -> Any:
    """The optimiser of another recipe."""
    return replaced(training, "optimizer", lambda recipe, spec: _optimizer(recipe.replace(**changes), spec))


decay_of_norms_and_biases = _by(decay_norms_and_biases=True)
# Where a number of Python's meets a tensor, some frameworks make a float32 of it first.
momentum_in_float32 = _by(momentum=float(np.float32(0.9)))
eps_below_the_root = replaced(
    training.optax, "scale_by_adam", lambda b1, b2, eps: _scale_by_adam(b1, b2, eps=0.0, eps_root=eps)
)
# An average of the gradients, as of Adam, in the place of their sum.
momentum_averages = replaced(
    training.optax,
    "trace",
    lambda momentum, nesterov: optax.chain(optax.scale(1 - momentum), _trace(momentum, nesterov)),
)


def _stale(recipe: Any, state: Any, *arguments: Any) -> Any:
    """The statistics of the state before are handed on."""
    after, measured = _train_step(recipe, state, *arguments)
    return after.replace(batch_stats=state.batch_stats), measured


statistics_not_kept = replaced(training, "train_step", _stale)


def _averaged_late(recipe: Any, state: Any, *arguments: Any) -> Any:
    """The average takes the weights in that it should have had a step before."""
    after, measured = _train_step(recipe, state, *arguments)
    taken = jax.tree.map(lambda a, p: recipe.ema_decay * a + (1 - recipe.ema_decay) * p, state.ema, state.params)
    first = state.step == 0
    return after.replace(ema=jax.tree.map(lambda new, a: jnp.where(first, new, a), after.ema, taken)), measured


average_a_step_late = replaced(training, "train_step", _averaged_late)


def _early(trainer: Any, batches: Any, after: Any) -> None:
    def shifted() -> Iterator[Any]:
        given = list(batches)
        for batch, following in zip(given, [*given[1:], given[-1]], strict=True):
            yield replace(batch, learning_rate=following.learning_rate)

    _fit(trainer, shifted(), after)


rate_of_the_step_after = replaced(training.FlaxTrainer, "fit", _early)
