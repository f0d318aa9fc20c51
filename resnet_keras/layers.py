"""What Keras has no layer for, on every one of its backends. Files saved with these need this package to load."""

import math
from typing import Any

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable(package="resnet_keras")
class UnbiasedBatchNormalization(layers.BatchNormalization):  # type: ignore[misc]  # Keras has no types
    """Batch normalisation whose running variance is the unbiased one, N / (N - 1), as in PyTorch and Caffe."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        # Computed before the native update: on the torch backend that one writes in place.
        kept = ops.multiply(self.moving_variance, self.momentum)
        outputs = super().call(inputs, training=training)
        if training and self.trainable:
            count = ops.cast(math.prod(ops.shape(inputs)[:-1]), kept.dtype)
            correction = ops.divide(count, ops.maximum(count - 1, 1))
            self.moving_variance.assign(kept + (self.moving_variance - kept) * correction)
        return outputs


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
