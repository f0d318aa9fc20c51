"""The vocabulary of the layer walk: what a layer is, what it holds, and what it does to a shape.

A walk is a tuple of layers in execution order. Each layer has a canonical path and names the paths it reads from;
``"input"`` is the batch of images. Shapes leave the batch out: ``(height, width, channels)`` or ``(features,)``.
Nothing here computes a tensor; everything else in the project that needs to know a network reads this.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

from common.errors import InputError

Shape = tuple[int, ...]
Padding = Literal["symmetric", "same", "valid", "ceil"]
RunningVariance = Literal["unbiased", "biased"]

INPUT = "input"


def window_padding(size: int, kernel: int, stride: int, dilation: int, padding: Padding) -> tuple[int, int]:
    """Zeros put before and after one spatial axis of length `size`.

    - ``symmetric``: dilation * (kernel - 1) / 2 on both sides (PyTorch, Caffe), whatever the size;
    - ``same``: as much as makes the output ceil(size / stride), the odd one out *after* (TensorFlow, XLA);
    - ``valid``: none;
    - ``ceil``: none before, after as much as keeps every input inside a window (Caffe's pooling, `ceil_mode`).
    """
    extent = dilation * (kernel - 1) + 1
    if padding == "symmetric":
        return (extent - 1) // 2, (extent - 1) // 2
    if padding == "same":
        total = max((-(-size // stride) - 1) * stride + extent - size, 0)
        return total // 2, total - total // 2
    if padding == "ceil":
        return 0, max(-(size - extent) % stride, 0)
    return 0, 0


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One step of the walk. `inputs` are the paths it reads from."""

    path: str
    inputs: tuple[str, ...]

    kind: ClassVar[str]
    # Layers that only pick or move values: they round nothing, so a loss of precision is never theirs.
    exact: ClassVar[bool] = False

    @property
    def parameters(self) -> dict[str, Shape]:
        """Trainable arrays: canonical name -> shape."""
        return {}

    @property
    def statistics(self) -> dict[str, Shape]:
        """Running statistics: canonical name -> shape."""
        return {}

    @property
    def arrays(self) -> dict[str, Shape]:
        """All that the layer stores, parameters first."""
        return self.parameters | self.statistics

    @property
    def parameter_count(self) -> int:
        return sum(map(prod, self.parameters.values()))

    def output_shape(self, *inputs: Shape) -> Shape:
        """Shape of the output for inputs of these shapes."""
        return inputs[0]

    def multiply_adds(self, *inputs: Shape) -> int:
        """Multiply-accumulate operations for one image; convolutions and dense layers only, as is usual."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Window(Layer):
    """A layer that slides a square window over both spatial axes."""

    kernel: int
    stride: int
    padding: Padding
    dilation: int = 1

    def spatial_padding(self, shape: Shape) -> tuple[tuple[int, int], tuple[int, int]]:
        """((top, bottom), (left, right)) for an input of `shape`."""
        height, width = (window_padding(n, self.kernel, self.stride, self.dilation, self.padding) for n in shape[:2])
        return height, width

    def spatial_output(self, shape: Shape) -> tuple[int, int]:
        extent = self.dilation * (self.kernel - 1) + 1
        height, width = (
            (n + sum(pad) - extent) // self.stride + 1
            for n, pad in zip(shape[:2], self.spatial_padding(shape), strict=True)
        )
        return height, width


@dataclass(frozen=True, kw_only=True)
class Conv(Window):
    """Convolution; kernel stored HWIO: (kernel, kernel, in_channels / groups, out_channels)."""

    in_channels: int
    out_channels: int
    groups: int = 1
    bias: bool = False
    kind = "conv"

    @property
    def parameters(self) -> dict[str, Shape]:
        kernel = (self.kernel, self.kernel, self.in_channels // self.groups, self.out_channels)
        return {f"{self.path}.kernel": kernel} | ({f"{self.path}.bias": (self.out_channels,)} if self.bias else {})

    def output_shape(self, *inputs: Shape) -> Shape:
        return (*self.spatial_output(inputs[0]), self.out_channels)

    def multiply_adds(self, *inputs: Shape) -> int:
        return prod(self.output_shape(*inputs)) * self.kernel**2 * self.in_channels // self.groups


@dataclass(frozen=True, kw_only=True)
class BatchNorm(Layer):
    """Batch normalisation over batch, height and width. `momentum` is the share of the old value that is kept."""

    channels: int
    eps: float
    momentum: float
    running_variance: RunningVariance
    kind = "norm"

    @property
    def parameters(self) -> dict[str, Shape]:
        return {f"{self.path}.scale": (self.channels,), f"{self.path}.bias": (self.channels,)}

    @property
    def statistics(self) -> dict[str, Shape]:
        return {f"{self.path}.mean": (self.channels,), f"{self.path}.var": (self.channels,)}


@dataclass(frozen=True, kw_only=True)
class ReLU(Layer):
    """Rectifier, max(x, 0)."""

    kind = "relu"
    exact = True


@dataclass(frozen=True, kw_only=True)
class Add(Layer):
    """The sum of two inputs: a branch, then the shortcut."""

    kind = "add"


@dataclass(frozen=True, kw_only=True)
class MaxPool(Window):
    """Maximum over a window; padding never wins."""

    kind = "max_pool"
    exact = True

    def output_shape(self, *inputs: Shape) -> Shape:
        return (*self.spatial_output(inputs[0]), inputs[0][-1])


@dataclass(frozen=True, kw_only=True)
class ZeroPadShortcut(Layer):
    """Option A of He et al. 2015, section 4.2: every `stride`-th pixel, new channels filled with zeros at the end."""

    stride: int
    channels: int
    kind = "zero_pad"
    exact = True

    def output_shape(self, *inputs: Shape) -> Shape:
        height, width = (-(-n // self.stride) for n in inputs[0][:2])
        return (height, width, self.channels)


@dataclass(frozen=True, kw_only=True)
class GlobalPool(Layer):
    """Average or maximum over all pixels."""

    op: Literal["average", "max"]
    kind = "global_pool"

    def output_shape(self, *inputs: Shape) -> Shape:
        return inputs[0][-1:]


@dataclass(frozen=True, kw_only=True)
class AdaptivePool(Layer):
    """Average or maximum over windows that divide the map into `height` by `width` cells, whatever its size.

    Of n pixels and o cells, cell i is of the pixels from floor(i n / o) up to ceil((i + 1) n / o): windows overlap
    where o does not divide n, and repeat pixels where the map is smaller. The identity where n = o.
    """

    op: Literal["average", "max"]
    height: int
    width: int
    kind = "adaptive_pool"

    def output_shape(self, *inputs: Shape) -> Shape:
        return (self.height, self.width, inputs[0][-1])


def adaptive_windows(size: int, cells: int) -> list[tuple[int, int]]:
    """First pixel and the one after the last of each cell along an axis, as `AdaptivePool` defines them."""
    return [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]


@dataclass(frozen=True, kw_only=True)
class Dropout(Layer):
    """In training each value is zero with probability `rate`, the others are divided by 1 - `rate` (Srivastava et al.
    2014, in the inverted form of every framework); nothing in eval mode."""

    rate: float
    kind = "dropout"


@dataclass(frozen=True, kw_only=True)
class Flatten(Layer):
    """All pixels in one row, in the order height, width, channel."""

    kind = "flatten"
    exact = True

    def output_shape(self, *inputs: Shape) -> Shape:
        return (prod(inputs[0]),)


@dataclass(frozen=True, kw_only=True)
class Dense(Layer):
    """Fully connected layer; kernel stored (in, out)."""

    in_features: int
    out_features: int
    # Where the input is a flattened map: its (height, width, channels), for backends that flatten in another order.
    flattened: Shape | None = None
    kind = "dense"

    @property
    def parameters(self) -> dict[str, Shape]:
        return {
            f"{self.path}.kernel": (self.in_features, self.out_features),
            f"{self.path}.bias": (self.out_features,),
        }

    def output_shape(self, *inputs: Shape) -> Shape:
        return (self.out_features,)

    def multiply_adds(self, *inputs: Shape) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True, kw_only=True)
class Softmax(Layer):
    """Softmax over the classes."""

    kind = "softmax"


def output_shapes(layers: Iterable[Layer], image: Shape) -> dict[str, Shape]:
    """Shape of every layer's output for images of shape (height, width, channels), by path.

    Raises `InputError` where the image is too small, or where a block's two branches do not meet.
    """
    shapes: dict[str, Shape] = {INPUT: image}
    for layer in layers:
        inputs = [shapes[path] for path in layer.inputs]
        shape = layer.output_shape(*inputs)
        size = f"{image[0]}x{image[1]}"
        if min(shape) < 1:
            raise InputError(f"input size {size} is too small: nothing is left of it at {layer.path}; use a larger one")
        if any(other != inputs[0] for other in inputs):
            raise InputError(
                f"input size {size} does not fit: the branches that meet at {layer.path} have shapes {inputs}"
            )
        if isinstance(layer, Dense) and inputs[0] != (layer.in_features,):
            raise InputError(
                f"input size {size} does not fit: {layer.path} expects {layer.in_features} features "
                f"and gets {inputs[0][-1]}; a flattened head takes images of its input_size only"
            )
        shapes[layer.path] = shape
    return shapes


def multiply_adds(layers: Iterable[Layer], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Multiply-adds of every layer by path, `shapes` from `output_shapes`."""
    return {layer.path: layer.multiply_adds(*(shapes[path] for path in layer.inputs)) for layer in layers}
