"""Keras' optimisers with the update rules of common/training/recipe.py, where Keras' own are others.

| | Keras | here, as in the papers and in PyTorch |
|---|---|---|
| SGD's velocity | contains the learning rate of its time | does not: it is multiplied when the parameter moves |
| decay that is added to the gradient | none (a regulariser would enter the loss and be clipped) | `coupled_decay` |
| Adam's epsilon | is added before the bias of the second moment is corrected | after |
| Adam's correction 1 - β^t | from a rounded β^t: off by 5e-5 at the first step in float32 | to the last digit |
| momentum and decay in float64, on TensorFlow | rounded to float32 first (`tf.cast` of a float of Python) | float64 |
| moving average of the weights | replaces the weights when `fit` ends | stays beside them |

Everything else is Keras' own: clipping by the global norm, decoupled decay (`weight_decay`), exemption from both decays
(`exclude_from_weight_decay`, which Keras does not write into a file), and the moving average.
"""

import math
from typing import Any

import keras
import numpy as np
from keras import ops


class _Recipe:
    """What both optimisers have in common; the other base is one of Keras."""

    global_clipnorm: float | None
    weight_decay: float | None

    def __init__(self, *args: Any, coupled_decay: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.coupled_decay = coupled_decay
        if self.weight_decay is not None:
            # Keras casts it to the variable's dtype, which on TensorFlow makes a float32 of a float of Python first.
            self.weight_decay = np.float64(self.weight_decay)

    def _decayed(self, gradient: Any, variable: Any) -> Any:
        """The gradient in the variable's dtype, with what `coupled_decay` adds to it."""
        gradient = ops.cast(gradient, variable.dtype)
        if self.coupled_decay and self._use_weight_decay(variable):  # type: ignore[attr-defined]
            gradient = gradient + self.coupled_decay * ops.convert_to_tensor(variable)
        return gradient

    @property
    def averages(self) -> list[Any]:
        """The moving average of each variable that `build` was given, in their order; none without `use_ema`."""
        return list(self._model_variables_moving_average) if self.use_ema else []  # type: ignore[attr-defined]

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        context = self._replica_context()
        if not self.global_clipnorm or context is None:
            return super()._clip_gradients(grads)  # type: ignore[misc]
        # Keras clips before it adds up what the replicas of `tf.distribute` have found, each by a norm of its own.
        norm = ops.sqrt(sum(ops.sum(ops.square(grad)) for grad in context.all_reduce("SUM", grads)))
        return [grad * (self.global_clipnorm / ops.maximum(norm, self.global_clipnorm)) for grad in grads]

    @staticmethod
    def _replica_context() -> Any:
        """That of `tf.distribute` where there are several replicas."""
        if keras.backend.backend() != "tensorflow":
            return None
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        return context if context is not None and context.num_replicas_in_sync > 1 else None

    def finalize_variable_values(self, var_list: Any) -> None:
        """Keras would put the moving average in the place of the weights here, at the end of every `fit`."""

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()  # type: ignore[misc]
        return config | {"coupled_decay": self.coupled_decay}


@keras.saving.register_keras_serializable(package="resnet_keras")
class SGD(_Recipe, keras.optimizers.SGD):  # type: ignore[misc]
    """``v = momentum * v + g``; ``p -= η * v``, with Nesterov ``p -= η * (g + momentum * v)``."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        step = gradient = self._decayed(gradient, variable)
        if self.momentum:
            kept = self.momentums[self._get_variable_index(variable)]
            velocity = self.momentum * kept + gradient
            self.assign(kept, velocity)
            step = gradient + self.momentum * velocity if self.nesterov else velocity
        self.assign_sub(variable, ops.cast(learning_rate, variable.dtype) * step)

    @property
    def slots(self) -> dict[str, list[Any]]:
        """Its own variables by what they are in the recipe, in the order of those that `build` was given."""
        return {"velocity": list(self.momentums)} if self.momentum else {}


@keras.saving.register_keras_serializable(package="resnet_keras")
class AdamW(_Recipe, keras.optimizers.Adam):  # type: ignore[misc]
    """``p -= η * m̂ / (sqrt(v̂) + epsilon)`` (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1)."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        gradient = self._decayed(gradient, variable)
        rate = ops.cast(learning_rate, variable.dtype)
        step = ops.cast(self.iterations + 1, variable.dtype)
        index = self._get_variable_index(variable)
        kept, kept_square = self._momentums[index], self._velocities[index]
        first = kept + (gradient - kept) * (1 - self.beta_1)
        second = kept_square + (ops.square(gradient) - kept_square) * (1 - self.beta_2)
        self.assign(kept, first)
        self.assign(kept_square, second)
        first, second = first / _correction(self.beta_1, step), second / _correction(self.beta_2, step)
        self.assign_sub(variable, rate * first / (ops.sqrt(second) + self.epsilon))

    @property
    def slots(self) -> dict[str, list[Any]]:
        """Its own variables by what they are in the recipe, in the order of those that `build` was given."""
        return {"moment1": list(self._momentums), "moment2": list(self._velocities)}


def _correction(beta: float, step: Any) -> Any:
    """1 - β^t without the rounding of β^t, which would leave three digits of it in float32."""
    return -ops.expm1(step * math.log(beta)) if beta else ops.ones_like(step)
