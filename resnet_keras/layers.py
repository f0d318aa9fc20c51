"""What Keras has no layer for, on every one of its backends. Files saved with these need this package to load."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import layers, ops

from common.architectures.layers import adaptive_windows


@keras.saving.register_keras_serializable(package="resnet_keras")
class UnbiasedBatchNormalization(layers.BatchNormalization):  # type: ignore[misc]  # Keras has no types
    """Batch normalisation whose running variance is the unbiased one, N / (N - 1), as in PyTorch and Caffe."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        if not (training and self.trainable):
            return super().call(inputs, training=training)
        if self._fusible(inputs):
            return self._fused(inputs)
        # Computed before the native update: on the torch backend that one writes in place.
        kept = ops.multiply(self.moving_variance, self.momentum)
        outputs = super().call(inputs, training=training)
        count = ops.cast(math.prod(ops.shape(inputs)[:-1]), kept.dtype) * self._replicas()
        correction = ops.divide(count, ops.maximum(count - 1, 1))
        self.moving_variance.assign(kept + (self.moving_variance - kept) * correction)
        return outputs

    def _fusible(self, inputs: Any) -> bool:
        """Whether TensorFlow has one operation for it all. Keras does it in a dozen, each a pass over the activations,
        and a training step of ResNet-50 takes a quarter longer."""
        return (
            keras.backend.backend() == "tensorflow"
            and len(inputs.shape) == 4
            and self.axis in (-1, 3)
            and self.scale
            and self.center
            and not self.synchronized
            and self.variable_dtype == "float32"
        )

    def _fused(self, inputs: Any) -> Any:
        import tensorflow as tf

        # Not tf.nn.fused_batch_norm, which raises epsilon to 1.001e-5 for versions of cuDNN long gone.
        outputs, mean, unbiased, *_ = tf.raw_ops.FusedBatchNormV3(
            x=ops.cast(inputs, "float32"),
            scale=self.gamma.value,
            offset=self.beta.value,
            mean=tf.constant([], tf.float32),
            variance=tf.constant([], tf.float32),
            epsilon=self.epsilon,
            is_training=True,
        )
        for kept, new in ((self.moving_mean, mean), (self.moving_variance, unbiased)):
            kept.assign(kept * self.momentum + new * (1 - self.momentum))
        return ops.cast(outputs, self.compute_dtype)

    def _replicas(self) -> int:
        """Among how many replicas of `tf.distribute` the batch is divided whose statistics these are."""
        if not self.synchronized:
            return 1
        import tensorflow as tf

        return tf.distribute.get_strategy().num_replicas_in_sync


@keras.saving.register_keras_serializable(package="resnet_keras")
class GivenDropout(layers.Layer):  # type: ignore[misc]
    """Dropout that is told what to keep: called with inputs and a mask of their shape, True where a value is kept."""

    def __init__(self, rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = rate

    def call(self, inputs: tuple[Any, Any], training: bool = False) -> Any:
        values, kept = inputs
        return ops.where(kept, values / (1 - self.rate), ops.zeros_like(values)) if training else values

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape[0]

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"rate": self.rate}


def with_masks(model: keras.Model, names: Sequence[str]) -> keras.Model:
    """The same layers, fed images and a mask for each of these, which are `layers.Dropout` and take it; in this order.

    Everything is called again from the first of them on, and a layer that is called with more than tensors is not
    called so here.
    """
    if not names:
        return model
    inputs = {name: keras.Input(model.get_layer(name).output.shape[1:], dtype="bool") for name in names}
    anew: dict[int, Any] = {}

    def renewed(tensors: Any) -> Any:
        return keras.tree.map_structure(lambda tensor: anew.get(id(tensor), tensor), tensors)

    for operation in model.operations:
        if operation.name in inputs:
            twin = GivenDropout(operation.rate, name=operation.name, dtype=operation.dtype_policy)
            anew[id(operation.output)] = twin((renewed(operation.input), inputs[operation.name]))
        elif any(id(tensor) in anew for tensor in keras.tree.flatten(operation.input)):
            anew[id(operation.output)] = operation(renewed(operation.input))
    return keras.Model((model.input, *inputs.values()), renewed(model.output), name=model.name)


@keras.saving.register_keras_serializable(package="resnet_keras")
class ZeroPadShortcut(layers.Layer):  # type: ignore[misc]
    """Option A of He et al. 2015, section 4.2: every `strides`-th pixel, new channels filled with zeros at the end."""

    def __init__(self, filters: int, strides: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        self.strides = strides

    def call(self, inputs: Any) -> Any:
        pixels = inputs[:, :: self.strides, :: self.strides, :]
        return ops.pad(pixels, ((0, 0), (0, 0), (0, 0), (0, self.filters - inputs.shape[-1])))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        batch, height, width, _ = input_shape
        return (batch, *(n and -(-n // self.strides) for n in (height, width)), self.filters)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"filters": self.filters, "strides": self.strides}


@keras.saving.register_keras_serializable(package="resnet_keras")
class Subsample(layers.Layer):  # type: ignore[misc]
    """The pixels on which a convolution of stride `strides` centres its windows.

    With symmetric padding the first of them is the first pixel; with `same` padding it lies half the remainder in.
    """

    def __init__(self, strides: int, same: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.strides = strides
        self.same = same

    def _first(self, size: Any) -> Any:
        return ((size - 1) % self.strides + 1) // 2 if self.same else 0

    def call(self, inputs: Any) -> Any:
        _, height, width, _ = ops.shape(inputs)
        return inputs[:, self._first(height) :: self.strides, self._first(width) :: self.strides, :]

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        batch, height, width, channels = input_shape
        return (batch, *(n and -(-(n - self._first(n)) // self.strides) for n in (height, width)), channels)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"strides": self.strides, "same": self.same}


@keras.saving.register_keras_serializable(package="resnet_keras")
class AdaptivePooling2D(layers.Layer):  # type: ignore[misc]
    """Average or maximum over windows that divide a map into `output_size` rows and columns: see
    `common.architectures.layers.AdaptivePool`. Keras' own layer needs a static size on TensorFlow."""

    def __init__(self, output_size: Sequence[int], op: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.output_size = tuple(output_size)
        self.op = op

    def call(self, inputs: Any) -> Any:
        rows = self._pooled(inputs, 1, lambda start, end: inputs[:, start:end])
        return self._pooled(rows, 2, lambda start, end: rows[:, :, start:end])

    def _pooled(self, inputs: Any, axis: int, window: Callable[[Any, Any], Any]) -> Any:
        cells = []
        for start, end in adaptive_windows(ops.shape(inputs)[axis], self.output_size[axis - 1]):
            if self.op == "max":
                cells.append(ops.max(window(start, end), axis))
            else:
                # Not `ops.mean`, which is of float32 in a float64 network on JAX and PyTorch.
                cells.append(ops.sum(window(start, end), axis) / ops.cast(end - start, inputs.dtype))
        return ops.stack(cells, axis)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (input_shape[0], *self.output_size, input_shape[-1])

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"output_size": self.output_size, "op": self.op}
