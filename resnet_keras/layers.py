"""What Keras has no layer for, on every one of its backends. Files saved with these need this package to load."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import layers, ops

from common.architectures.layers import adaptive_windows


def from_channels_last(items: Iterable[Any], data_format: str) -> tuple[Any, ...]:
    """What is listed as (height, width, channels), with the batch before or not, in the order of `data_format`."""
    *batch, height, width, channels = items
    order = (height, width, channels) if data_format == "channels_last" else (channels, height, width)
    return (*batch, *order)


def to_channels_last(items: Iterable[Any], data_format: str) -> tuple[Any, ...]:
    """What is listed in the order of `data_format`, as (height, width, channels), with the batch before or not."""
    *batch, first, second, third = items
    order = (first, second, third) if data_format == "channels_last" else (second, third, first)
    return (*batch, *order)


def channel_axis(data_format: str) -> int:
    """The axis of the channels of a batch of images."""
    return -1 if data_format == "channels_last" else 1


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
        counted = list(ops.shape(inputs))
        del counted[self.axis]
        count = ops.cast(math.prod(counted), kept.dtype) * self._replicas()
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


class _Strided(layers.Layer):  # type: ignore[misc]
    """Every `strides`-th pixel of images, in either data format."""

    def __init__(self, strides: int, data_format: str = "channels_last", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.strides = strides
        self.data_format = data_format

    def first(self, size: Any) -> Any:
        """The first pixel that is taken of so many."""
        return 0

    def call(self, inputs: Any) -> Any:
        _, *sizes, _ = to_channels_last(ops.shape(inputs), self.data_format)
        rows, columns = (slice(self.first(size), None, self.strides) for size in sizes)
        return inputs[from_channels_last((slice(None), rows, columns, slice(None)), self.data_format)]

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        batch, *sizes, channels = to_channels_last(input_shape, self.data_format)
        taken = (n and -(-(n - self.first(n)) // self.strides) for n in sizes)
        return from_channels_last((batch, *taken, channels), self.data_format)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"strides": self.strides, "data_format": self.data_format}


@keras.saving.register_keras_serializable(package="resnet_keras")
class ZeroPadShortcut(_Strided):
    """Option A of He et al. 2015, section 4.2: every `strides`-th pixel, new channels filled with zeros at the end."""

    def __init__(self, filters: int, strides: int, **kwargs: Any) -> None:
        super().__init__(strides, **kwargs)
        self.filters = filters

    def call(self, inputs: Any) -> Any:
        new = self.filters - inputs.shape[channel_axis(self.data_format)]
        return ops.pad(super().call(inputs), from_channels_last(((0, 0), (0, 0), (0, 0), (0, new)), self.data_format))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        *pixels, _ = to_channels_last(super().compute_output_shape(input_shape), self.data_format)
        return from_channels_last((*pixels, self.filters), self.data_format)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"filters": self.filters}


@keras.saving.register_keras_serializable(package="resnet_keras")
class Subsample(_Strided):
    """The pixels on which a convolution of stride `strides` centres its windows.

    With symmetric padding the first of them is the first pixel; with `same` padding it lies half the remainder in.
    """

    def __init__(self, strides: int, same: bool, **kwargs: Any) -> None:
        super().__init__(strides, **kwargs)
        self.same = same

    def first(self, size: Any) -> Any:
        return ((size - 1) % self.strides + 1) // 2 if self.same else 0

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"same": self.same}


@keras.saving.register_keras_serializable(package="resnet_keras")
class AdaptivePooling2D(layers.Layer):  # type: ignore[misc]
    """Average or maximum over windows that divide a map into `output_size` rows and columns: see
    `common.architectures.layers.AdaptivePool`. Keras' own layer needs a static size on TensorFlow."""

    def __init__(self, output_size: Sequence[int], op: str, data_format: str = "channels_last", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.output_size = tuple(output_size)
        self.op = op
        self.data_format = data_format

    def call(self, inputs: Any) -> Any:
        _, rows, columns, _ = to_channels_last(range(4), self.data_format)
        height, width = self.output_size
        return self._pooled(self._pooled(inputs, rows, height), columns, width)

    def _pooled(self, inputs: Any, axis: int, cells: int) -> Any:
        pooled = []
        for start, end in adaptive_windows(ops.shape(inputs)[axis], cells):
            window = inputs[(*(slice(None),) * axis, slice(start, end))]
            if self.op == "max":
                pooled.append(ops.max(window, axis))
            else:
                # Not `ops.mean`, which is of float32 in a float64 network on JAX and PyTorch.
                pooled.append(ops.sum(window, axis) / ops.cast(end - start, inputs.dtype))
        return ops.stack(pooled, axis)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        batch, _, _, channels = to_channels_last(input_shape, self.data_format)
        return from_channels_last((batch, *self.output_size, channels), self.data_format)

    def get_config(self) -> dict[str, Any]:
        own = {"output_size": self.output_size, "op": self.op, "data_format": self.data_format}
        return super().get_config() | own
