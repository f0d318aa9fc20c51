"""Defects planted in how Keras trains. What each must be caught by stands in catalogue.py."""

from typing import Any

import keras
from keras import ops

from resnet_keras import optimizers, training
from resnet_keras.objective import CrossEntropy
from tests.mutants.of_keras import biased_variance  # noqa: F401  of the layers, in training as ever
from tests.mutants.planting import both, replaced

_optimizer = training._optimizer


def _by(**changes: Any) -> Any:
    """The optimiser of another recipe."""
    return replaced(training, "_optimizer", lambda model, recipe: _optimizer(model, recipe.replace(**changes)))


decoupled_decay = _by(decay="decoupled")
decay_of_norms_and_biases = _by(decay_norms_and_biases=True)


def _clipping(model: Any, recipe: Any) -> Any:
    """Every gradient by its own norm."""
    optimizer = _optimizer(model, recipe)
    optimizer.clipnorm, optimizer.global_clipnorm = optimizer.global_clipnorm, None
    return optimizer


def _folded(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    keras.optimizers.SGD.update_step(self, self._decayed(gradient, variable), variable, learning_rate)


def _unfolded(self: Any) -> dict[str, list[Any]]:
    """The velocity as a port would read it: without the rate of now."""
    return {"velocity": [-ops.convert_to_tensor(v) / self.learning_rate for v in self.momentums]}


rate_in_the_velocity = both(
    replaced(optimizers.SGD, "update_step", _folded), replaced(optimizers.SGD, "slots", property(_unfolded))
)


def _kerass_own(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
    keras.optimizers.Adam.update_step(self, self._decayed(gradient, variable), variable, learning_rate)


eps_before_the_bias_correction = replaced(optimizers.AdamW, "update_step", _kerass_own)
clipped_one_by_one = replaced(training, "_optimizer", _clipping)
smoothing_left_out = replaced(training, "CrossEntropy", lambda logits, smoothing=0.0: CrossEntropy(logits))
