"""What Keras has no layer for, on every one of its backends; files saved with these need this package to load. And
its own layers, padded by the names of the spec."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from common.architectures.layers import Activation, Padding, adaptive_windows, sides_of, window_padding


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
    """Dropout that is told what to keep: called with inputs and a mask of their shape, or of one value an image for
    stochastic depth; True where a value is kept."""

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
    own = (model.get_layer(name) for name in names)
    shapes = {layer.name: (layer.noise_shape or layer.output.shape)[1:] for layer in own}
    inputs = {name: keras.Input(shape, dtype="bool") for name, shape in shapes.items()}
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
class UnusedConv2D(layers.Conv2D):  # type: ignore[misc]
    """A convolution whose arrays are stored and never used: what it is given goes through as it is.

    A functional model has no layers that lead nowhere, as a module of PyTorch has.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"trainable": False} | kwargs)

    def call(self, inputs: Any) -> Any:
        return inputs


@keras.saving.register_keras_serializable(package="resnet_keras")
class UnusedBatchNormalization(layers.BatchNormalization):  # type: ignore[misc]
    """As `UnusedConv2D`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"trainable": False} | kwargs)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return inputs


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
class LowestPadding2D(layers.ZeroPadding2D):  # type: ignore[misc]
    """Pads with what no maximum takes. Zeros are as good behind a ReLU, as in keras.applications, and only there."""

    def call(self, inputs: Any) -> Any:
        pads = from_channels_last(((0, 0), *self.padding, (0, 0)), self.data_format)
        return ops.pad(inputs, pads, constant_values=-math.inf)


@keras.saving.register_keras_serializable(package="resnet_keras")
class PaddedAveragePooling2D(layers.Layer):  # type: ignore[misc]
    """Average pooling by any padding of the spec, which counts or does not: see
    `common.architectures.layers.AveragePool`."""

    def __init__(
        self,
        pool_size: Sequence[int],
        strides: int,
        padding: Padding | int,
        count_padding: bool,
        data_format: str = "channels_last",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.pool_size = tuple(pool_size)
        self.strides = strides
        self.padding = padding
        self.count_padding = count_padding
        self.data_format = data_format

    def call(self, inputs: Any) -> Any:
        averages = self._averages(inputs)
        if self.count_padding and self.padding != "ceil":
            return averages
        return averages / self._averages(ops.ones_like(inputs[:1]))

    def _averages(self, images: Any) -> Any:
        _, *sizes, _ = to_channels_last(ops.shape(images), self.data_format)
        pads = from_channels_last(((0, 0), *map(self._pads, sizes, self.pool_size), (0, 0)), self.data_format)
        return ops.average_pool(
            ops.pad(images, pads), self.pool_size, self.strides, padding="valid", data_format=self.data_format
        )

    def _pads(self, size: Any, side: int) -> tuple[Any, Any]:
        return window_padding(size, side, self.strides, 1, self.padding)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        batch, *sizes, channels = to_channels_last(input_shape, self.data_format)
        pooled = (
            size and (size + sum(self._pads(size, side)) - side) // self.strides + 1
            for size, side in zip(sizes, self.pool_size, strict=True)
        )
        return from_channels_last((batch, *pooled, channels), self.data_format)

    def get_config(self) -> dict[str, Any]:
        names = ("pool_size", "strides", "padding", "count_padding", "data_format")
        return super().get_config() | {name: getattr(self, name) for name in names}


@keras.saving.register_keras_serializable(package="resnet_keras")
class LocalResponseNormalization(layers.Layer):  # type: ignore[misc]
    """x / (k + alpha * sum of squares over `size` channels) ** beta: see
    `common.architectures.layers.LocalResponseNorm`. Keras has none, and TensorFlow's is of float32 alone."""

    def __init__(
        self, size: int, alpha: float, beta: float, k: float, data_format: str = "channels_last", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k
        self.data_format = data_format

    def call(self, inputs: Any) -> Any:
        channels = inputs.shape[channel_axis(self.data_format)]
        around = ((0, 0), (0, 0), (0, 0), (self.size // 2, (self.size - 1) // 2))
        squares = ops.pad(ops.square(inputs), from_channels_last(around, self.data_format))
        summed = 0
        for first in range(self.size):
            window = (slice(None), slice(None), slice(None), slice(first, first + channels))
            summed = summed + squares[from_channels_last(window, self.data_format)]
        return inputs / ops.power(self.k + self.alpha * summed, self.beta)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        names = ("size", "alpha", "beta", "k", "data_format")
        return super().get_config() | {name: getattr(self, name) for name in names}


@keras.saving.register_keras_serializable(package="resnet_keras")
class Affine(layers.Layer):  # type: ignore[misc]
    """x * scale + shift for each channel. `layers.Rescaling` reads the order of the axes from the user's keras.json,
    and rounds lists to float32 in a float64 network."""

    def __init__(
        self, scale: Sequence[float], shift: Sequence[float], data_format: str = "channels_last", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.scale = tuple(scale)
        self.shift = tuple(shift)
        self.data_format = data_format

    def call(self, inputs: Any) -> Any:
        shape = from_channels_last((1, 1, 1, len(self.scale)), self.data_format)
        scale, shift = (
            ops.reshape(ops.convert_to_tensor(numbers, dtype=inputs.dtype), shape)
            for numbers in (self.scale, self.shift)
        )
        return inputs * scale + shift

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"scale": self.scale, "shift": self.shift, "data_format": self.data_format}


@keras.saving.register_keras_serializable(package="resnet_keras")
class Normalization(layers.Normalization):  # type: ignore[misc]
    """(x - mean) / std for each channel, by numbers that it was made with and in the precision of the network.

    It has the variables of Keras' own, so that files with and without them are those of keras.applications; `stored`
    are their values. Files that hold others are of a network that sees its images otherwise: they raise a `ValueError`.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], stored: Mapping[str, Any], axis: int = -1, **kwargs: Any
    ) -> None:
        super().__init__(axis=axis, **kwargs)
        self.numbers = {"mean": tuple(mean), "std": tuple(std)}
        self.stored = {name: np.asarray(values).tolist() for name, values in stored.items()}

    def build(self, input_shape: Any) -> None:
        self._building = True
        super().build(input_shape)
        self.adapt_mean.assign(self.stored["mean"])
        self.adapt_variance.assign(self.stored["variance"])
        self._building = False

    def finalize_state(self) -> None:
        """What Keras calls behind the loading of the variables."""
        if self._building:
            return
        for name, variable in (("mean", self.adapt_mean), ("variance", self.adapt_variance)):
            found = ops.convert_to_numpy(variable)
            if not np.allclose(found, self.stored[name], 1e-6, 0):
                raise ValueError(
                    f"{self.name} has the {name} {self.stored[name]} and these weights have {found.tolist()}: their "
                    "network normalises its images otherwise; build it with weights=, or by from_checkpoint"
                )

    def adapt(self, data: Any) -> None:
        raise ValueError(f"{self.name} has its numbers from the spec; set input_mean and input_std there")

    def call(self, inputs: Any) -> Any:
        shape = [1] * len(inputs.shape)
        shape[self.axis[0]] = -1
        mean, std = (
            ops.reshape(ops.convert_to_tensor(self.numbers[name], dtype=inputs.dtype), shape)
            for name in ("mean", "std")
        )
        return (inputs - mean) / std

    def get_config(self) -> dict[str, Any]:
        config = super().get_config() | self.numbers | {"stored": self.stored, "axis": self.axis[0]}
        return {name: value for name, value in config.items() if name not in ("variance", "invert")}


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


@keras.saving.register_keras_serializable(package="resnet_keras")  # type: ignore[untyped-decorator]
def scaled_tanh(x: Any) -> Any:
    """1.7159 tanh(2 x / 3), of LeCun et al. 1998."""
    return 1.7159 * ops.tanh(x * (2 / 3))


# What `layers.Activation` takes.
ACTIVATIONS: dict[Activation, Any] = {
    "relu": "relu",
    "relu6": "relu6",
    "tanh": "tanh",
    "scaled_tanh": scaled_tanh,
    "sigmoid": "sigmoid",
    "silu": "silu",
}


def conv2d(
    x: Any,
    filters: int,
    kernel_size: int | tuple[int, int],
    strides: int = 1,
    *,
    padding: Padding | int,
    dilation_rate: int = 1,
    data_format: str,
    name: str,
    **options: Any,
) -> Any:
    """A convolution padded by name or number; `options` as in `layers.Conv2D`.

    What pads and picks pixels before it is named after it: ``{name}_pad``, ``{name}_subsample``.
    """
    sides, layout = sides_of(kernel_size), {"data_format": data_format}
    if strides > 1 and dilation_rate > 1 and max(sides) > 1:
        # Conv2D takes a stride or a dilation, not both. Dilated windows at this stride read no other pixels than these.
        same = padding == "same"
        reach = _static_padding("symmetric" if same else padding, sides, strides, dilation_rate)
        x = layers.ZeroPadding2D(reach, **layout, name=f"{name}_pad")(x)
        x = Subsample(strides, same, **layout, name=f"{name}_subsample")(x)
        strides, dilation_rate, padding = 1, dilation_rate // strides, "valid"
    x, pads = _padded(x, sides, strides, padding, layers.ZeroPadding2D, data_format, name, dilation_rate)
    options |= {"strides": strides, "padding": pads, "dilation_rate": dilation_rate, **layout, "name": name}
    return layers.Conv2D(filters, kernel_size, **options)(x)


def depthwise_conv2d(
    x: Any,
    kernel_size: int | tuple[int, int],
    strides: int = 1,
    *,
    padding: Padding | int,
    data_format: str,
    name: str,
    **options: Any,
) -> Any:
    """A depthwise convolution padded by name or number; `options` as in `layers.DepthwiseConv2D`."""
    x, pads = _padded(x, sides_of(kernel_size), strides, padding, layers.ZeroPadding2D, data_format, name)
    options |= {"strides": strides, "padding": pads, "data_format": data_format, "name": name}
    return layers.DepthwiseConv2D(kernel_size, **options)(x)


def max_pool2d(
    x: Any, pool_size: int | tuple[int, int], strides: int, *, padding: Padding | int, data_format: str, name: str
) -> Any:
    """A max-pool padded by name or number, with what never wins."""
    x, pads = _padded(x, sides_of(pool_size), strides, padding, LowestPadding2D, data_format, name)
    return layers.MaxPooling2D(pool_size, strides, pads, data_format=data_format, name=name)(x)


def average_pool2d(
    x: Any,
    pool_size: int | tuple[int, int],
    strides: int,
    *,
    padding: Padding | int,
    count_padding: bool,
    data_format: str,
    name: str,
) -> Any:
    """An average pool padded by name or number: of Keras' own layers wherever these can express it."""
    sides = sides_of(pool_size)
    options = {"data_format": data_format, "name": name}
    if padding == "valid":
        return layers.AveragePooling2D(pool_size, strides, "valid", **options)(x)
    # Keras' own padding never counts. But where it is not symmetric, Keras on PyTorch repeats pixels of the border.
    uneven = padding == "same" and not _like_same("symmetric", sides, strides)
    if (
        not count_padding
        and not (uneven and keras.backend.backend() == "torch")
        and (padding == "same" or _like_same(padding, sides, strides))
    ):
        return layers.AveragePooling2D(pool_size, strides, "same", **options)(x)
    if count_padding and (padding == "symmetric" or isinstance(padding, int)):
        reach = _static_padding(padding, sides, strides)
        x = layers.ZeroPadding2D(reach, data_format=data_format, name=f"{name}_pad")(x)
        return layers.AveragePooling2D(pool_size, strides, "valid", **options)(x)
    return PaddedAveragePooling2D(sides, strides, padding, count_padding, **options)(x)


def stochastic_depth(rate: float, name: str) -> Any:
    """Sets whole images to zero in training, as keras.applications' EfficientNet: a dropout of one draw an image."""
    return layers.Dropout(rate, noise_shape=(None, 1, 1, 1), name=name)


def _padded(
    x: Any,
    sides: tuple[int, int],
    strides: int,
    padding: Padding | int,
    layer: type[layers.Layer],
    data_format: str,
    name: str,
    dilation_rate: int = 1,
) -> tuple[Any, str]:
    """`x`, padded by such a layer where a window has to be told so, and the padding that is left to Keras."""
    if padding == "same" and sides != (1, 1):
        return x, "same"
    if _like_same(padding, sides, strides, dilation_rate):
        return x, "same"  # and no padded copy of the input
    # "same" would put the odd row and column after the image at even sizes.
    reach = _static_padding(padding, sides, strides, dilation_rate)
    if any(map(any, reach)):
        x = layer(reach, data_format=data_format, name=f"{name}_pad")(x)
    return x, "valid"


def _like_same(padding: Padding | int, sides: tuple[int, int], strides: int, dilation_rate: int = 1) -> bool:
    """Whether padding that is symmetric is what Keras calls "same"."""
    symmetric = _static_padding("symmetric", sides, strides, dilation_rate)
    odd = strides == 1 and max(sides) > 1 and all(side % 2 for side in sides)
    return odd and padding not in ("same", "valid") and _static_padding(padding, sides, 1, dilation_rate) == symmetric


def _static_padding(
    padding: Padding | int, sides: tuple[int, int], strides: int, dilation_rate: int = 1
) -> tuple[tuple[int, int], ...]:
    """((top, bottom), (left, right)) of what pads by its size alone."""
    if isinstance(padding, int):
        return ((padding, padding),) * 2
    if padding == "ceil":  # what lies beyond the last window is never reached, and no window begins beyond the map
        return tuple((0, min(side, strides) - 1) for side in sides)
    reach = (dilation_rate * (side - 1) // 2 if padding == "symmetric" else 0 for side in sides)
    return tuple((count, count) for count in reach)
