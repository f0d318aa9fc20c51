"""What is minimised, and what is counted of a step or of an evaluation."""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="resnet_keras")
class CrossEntropy(keras.losses.Loss):  # type: ignore[misc]
    """Cross-entropy of outputs (N, classes) and labels (N,), a share of the target spread evenly over the classes.

    Keras' own losses with smoothing want one-hot labels, and clip probabilities at 1e-7, which is another function
    where one is smaller.
    """

    def __init__(self, from_logits: bool = True, label_smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**{"name": "cross_entropy"} | kwargs)
        self.from_logits = from_logits
        self.label_smoothing = label_smoothing

    def call(self, y_true: Any, y_pred: Any) -> Any:
        labels = ops.cast(y_true, "int32")
        if self.from_logits:
            targets = ops.one_hot(labels, y_pred.shape[-1], dtype=y_pred.dtype)
            return keras.losses.categorical_crossentropy(targets, y_pred, True, self.label_smoothing)
        # Taken, not multiplied by one-hot targets: a probability of 0 that is no label's has a logarithm too.
        likelihood = ops.take_along_axis(y_pred, ops.expand_dims(ops.maximum(labels, 0), 1), axis=1)
        loss = -ops.squeeze(ops.log(likelihood), axis=1)
        if not self.label_smoothing:
            return loss
        return loss * (1 - self.label_smoothing) - ops.mean(ops.log(y_pred), axis=-1) * self.label_smoothing

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"from_logits": self.from_logits, "label_smoothing": self.label_smoothing}


@keras.saving.register_keras_serializable(package="resnet_keras")
class Tally(keras.metrics.Metric):  # type: ignore[misc]
    """The sum of a loss, the number of correct answers and the number of examples: of the last batch alone, or of all
    since the last reset. Labels below 0 are counted nowhere. `output` is the number of the model's output: of another
    than the first, the names of the results end in it."""

    def __init__(self, loss: CrossEntropy, of_all: bool = False, output: int = 0, **kwargs: Any) -> None:
        super().__init__(**{"name": "tally", "dtype": "float64"} | kwargs)
        self.loss = loss
        self.of_all = of_all
        self.output = output
        names = ("loss_sum", "correct", "count")
        named = (numbered(name, output) for name in names)
        self._sums = [self.add_variable((), "zeros", dtype=self.dtype, name=name) for name in named]

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        labels, outputs = ops.cast(y_true, "int32"), ops.cast(y_pred, self.loss.dtype)
        known = labels >= 0
        losses = ops.where(known, self.loss.call(labels, outputs), 0)
        found = (losses, ops.equal(labels, ops.cast(ops.argmax(outputs, axis=-1), "int32")), known)
        for kept, values in zip(self._sums, found, strict=True):
            new = ops.sum(ops.cast(values, self.dtype))
            kept.assign(kept + new if self.of_all else new)

    def result(self) -> dict[str, Any]:
        return {variable.name: ops.copy(variable) for variable in self._sums}

    def get_config(self) -> dict[str, Any]:
        loss = keras.saving.serialize_keras_object(self.loss)
        return super().get_config() | {"loss": loss, "of_all": self.of_all, "output": self.output}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Tally":
        loss: Any = keras.saving.deserialize_keras_object(config["loss"])
        return cls(**config | {"loss": loss})


def numbered(name: str, output: int) -> str:
    """What a `Tally` of that output calls a result."""
    return f"{name}_{output}" if output else name
