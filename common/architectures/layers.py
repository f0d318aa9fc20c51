"""The vocabulary of the layer walk: what a layer is, what it holds, and what it does to a shape.

A walk is a tuple of layers in execution order. Each layer has a canonical path and names the paths it reads from;
``"input"`` is the batch of images. Shapes leave the batch out: ``(height, width, channels)`` or ``(features,)``.
Nothing here computes a tensor; everything else in the project that needs to know a network reads this.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Literal

from common.errors import InputError, SpecError

Shape = tuple[int, ...]
Padding = Literal["symmetric", "same", "valid", "ceil"]
RunningVariance = Literal["unbiased", "biased"]
Activation = Literal["relu", "relu6", "tanh", "scaled_tanh", "sigmoid", "silu"]

INPUT = "input"


def window_padding(size: int, kernel: int, stride: int, dilation: int, padding: Padding | int) -> tuple[int, int]:
    """What is put before and after one spatial axis of length `size`.

    - ``symmetric``: dilation * (kernel - 1) / 2 on both sides (PyTorch, Caffe), whatever the size;
    - ``same``: as much as makes the output ceil(size / stride), the odd one out *after* (TensorFlow, XLA);
    - ``valid``: none;
    - ``ceil``: none before, after as much as keeps every input inside a window that begins in the image (Caffe's
      pooling, `ceil_mode`);
    - a number: so many on both sides.
    """
    extent = dilation * (kernel - 1) + 1
    # Sizes are compared only where windows leave gaps: `size` may be a tensor of a graph that is still to be run.
    gaps = stride > extent
    match padding:
        case "symmetric":
            return (extent - 1) // 2, (extent - 1) // 2
        case "same":
            total = extent - 1 - (size - 1) % stride
            total = max(total, 0) if gaps else total
            return total // 2, total - total // 2
        case "ceil":
            after = (extent - size) % stride
            return 0, 0 if gaps and after >= extent else after
        case "valid":
            return 0, 0
    return padding, padding


def sides_of(kernel: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a window; a square one is given by one number."""
    return (kernel, kernel) if isinstance(kernel, int) else kernel


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One step of the walk. `inputs` are the paths it reads from."""

    path: str
    inputs: tuple[str, ...]
    # An earlier layer that holds arrays of the same shapes: this one computes with those and has none of its own.
    shares: str | None = None
    # It runs in training mode alone: a layer of a branch that ends in an auxiliary output, where eval mode has none.
    training_only: bool = False
    # It never runs: its arrays are stored, and stay as they are. Nothing reads it.
    unused: bool = False

    kind: ClassVar[str]
    # Layers that only pick or move values: they round nothing, so a loss of precision is never theirs.
    exact: ClassVar[bool] = False

    @property
    def trained(self) -> dict[str, Shape]:
        """Shape of every trainable array that it computes with, by role: kernel, bias, scale."""
        return {}

    @property
    def averaged(self) -> dict[str, Shape]:
        """Shape of every running statistic that it computes with, by role: mean, var."""
        return {}

    @property
    def uses(self) -> dict[str, str]:
        """Canonical name of every array that it computes with, by role; those of another layer where it `shares`."""
        return {role: f"{self.shares or self.path}.{role}" for role in self.trained | self.averaged}

    @property
    def parameters(self) -> dict[str, Shape]:
        """Trainable arrays of its own: canonical name -> shape."""
        return self._own(self.trained)

    @property
    def statistics(self) -> dict[str, Shape]:
        """Running statistics of its own: canonical name -> shape."""
        return self._own(self.averaged)

    @property
    def arrays(self) -> dict[str, Shape]:
        """All that the layer stores, parameters first."""
        return self._own(self.trained | self.averaged)

    def _own(self, shapes: dict[str, Shape]) -> dict[str, Shape]:
        return {} if self.shares else {f"{self.path}.{role}": shape for role, shape in shapes.items()}

    @property
    def parameter_count(self) -> int:
        return sum(map(prod, self.parameters.values()))

    def output_shape(self, *inputs: Shape) -> Shape:
        """Shape of the output for inputs of these shapes."""
        return inputs[0]

    def fits(self, *inputs: Shape) -> bool:
        """Whether inputs of these shapes can meet in this layer."""
        return all(other == inputs[0] for other in inputs)

    def multiply_adds(self, *inputs: Shape) -> int:
        """Multiply-accumulate operations for one image; convolutions and dense layers only, as is usual."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Window(Layer):
    """A layer that slides a window over both spatial axes: a square one, or one of (height, width)."""

    kernel: int | tuple[int, int]
    stride: int
    padding: Padding | int
    dilation: int = 1

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the window."""
        return sides_of(self.kernel)

    def spatial_padding(self, shape: Shape) -> tuple[tuple[int, int], tuple[int, int]]:
        """((top, bottom), (left, right)) for an input of `shape`."""
        height, width = (
            window_padding(n, side, self.stride, self.dilation, self.padding)
            for n, side in zip(shape[:2], self.sides, strict=True)
        )
        return height, width

    def spatial_output(self, shape: Shape) -> tuple[int, int]:
        height, width = (
            (n + sum(pad) - (self.dilation * (side - 1) + 1)) // self.stride + 1
            for n, side, pad in zip(shape[:2], self.sides, self.spatial_padding(shape), strict=True)
        )
        return height, width

    def output_shape(self, *inputs: Shape) -> Shape:
        return (*self.spatial_output(inputs[0]), inputs[0][-1])


@dataclass(frozen=True, kw_only=True)
class Conv(Window):
    """Convolution; kernel stored HWIO: (height, width, in_channels / groups, out_channels). Padded with zeros."""

    in_channels: int
    out_channels: int
    groups: int = 1
    bias: bool = False
    kind = "conv"

    @property
    def trained(self) -> dict[str, Shape]:
        kernel = (*self.sides, self.in_channels // self.groups, self.out_channels)
        return {"kernel": kernel} | ({"bias": (self.out_channels,)} if self.bias else {})

    def output_shape(self, *inputs: Shape) -> Shape:
        return (*self.spatial_output(inputs[0]), self.out_channels)

    def multiply_adds(self, *inputs: Shape) -> int:
        return prod(self.output_shape(*inputs)) * prod(self.sides) * self.in_channels // self.groups


@dataclass(frozen=True, kw_only=True)
class DepthwiseConv(Conv):
    """Convolution of every channel with a window of its own; kernel stored (height, width, 1, channels).

    A kind of its own, since Keras has another layer for it, which lays its kernel out in another way. Shapes do not
    show it: a convolution of a single input channel is an ordinary one.
    """

    out_channels: int = field(init=False)
    groups: int = field(init=False)
    kind = "depthwise"

    def __post_init__(self) -> None:
        for name in ("out_channels", "groups"):
            object.__setattr__(self, name, self.in_channels)


@dataclass(frozen=True, kw_only=True)
class BatchNorm(Layer):
    """Batch normalisation over batch, height and width. `momentum` is the share of the old value that is kept."""

    channels: int
    eps: float
    momentum: float
    running_variance: RunningVariance
    scale: bool = True
    kind = "norm"

    @property
    def trained(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {"scale": (self.channels,), "bias": (self.channels,)}
        return shapes if self.scale else {"bias": (self.channels,)}

    @property
    def averaged(self) -> dict[str, Shape]:
        return {"mean": (self.channels,), "var": (self.channels,)}


@dataclass(frozen=True, kw_only=True)
class LocalResponseNorm(Layer):
    """x / (k + alpha * sum of squares over `size` channels) ** beta (Krizhevsky et al. 2012, section 3.3).

    Channel c sums over those from c - size // 2 up to c + (size - 1) // 2 that there are. `alpha` is undivided as in
    the paper and in TensorFlow; PyTorch and Caffe divide theirs by `size`. TensorFlow gives half the window, a radius.
    """

    size: int
    alpha: float
    beta: float
    k: float
    kind = "lrn"


@dataclass(frozen=True, kw_only=True)
class Affine(Layer):
    """x * scale + shift for each channel, by numbers of the spec: a change of the images' preprocessing."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]
    kind = "affine"


# Of images with ImageNet's mean and deviation, for weights that were trained on images from -1 to 1: torchvision's
# `transform_input`.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRANSFORM_SCALE = tuple(std / 0.5 for std in _STD)
TRANSFORM_SHIFT = tuple((mean - 0.5) / 0.5 for mean in _MEAN)


@dataclass(frozen=True, kw_only=True)
class ReLU(Layer):
    """Rectifier, max(x, 0)."""

    kind = "relu"
    exact = True


@dataclass(frozen=True, kw_only=True)
class ReLU6(Layer):
    """Rectifier that saturates, min(max(x, 0), 6)."""

    kind = "relu6"
    exact = True


@dataclass(frozen=True, kw_only=True)
class Tanh(Layer):
    """Hyperbolic tangent."""

    kind = "tanh"


@dataclass(frozen=True, kw_only=True)
class ScaledTanh(Layer):
    """1.7159 tanh(2 x / 3) (LeCun et al. 1998, "Gradient-based learning applied to document recognition", A)."""

    kind = "scaled_tanh"


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Layer):
    """Logistic function, 1 / (1 + exp(-x))."""

    kind = "sigmoid"


@dataclass(frozen=True, kw_only=True)
class SiLU(Layer):
    """x times its logistic function, also called swish."""

    kind = "silu"


# What a field of a spec calls them.
ACTIVATIONS: dict[Activation, type[Layer]] = {
    "relu": ReLU,
    "relu6": ReLU6,
    "tanh": Tanh,
    "scaled_tanh": ScaledTanh,
    "sigmoid": Sigmoid,
    "silu": SiLU,
}


@dataclass(frozen=True, kw_only=True)
class Add(Layer):
    """The sum of two inputs: a branch, then the shortcut."""

    kind = "add"


@dataclass(frozen=True, kw_only=True)
class Concat(Layer):
    """The channels of all inputs, one input after the other."""

    kind = "concat"
    exact = True

    def output_shape(self, *inputs: Shape) -> Shape:
        return (*inputs[0][:-1], sum(shape[-1] for shape in inputs))

    def fits(self, *inputs: Shape) -> bool:
        return all(other[:-1] == inputs[0][:-1] for other in inputs)


@dataclass(frozen=True, kw_only=True)
class Gate(Layer):
    """The first input, each channel times its one value in the second, which is of one pixel (Hu et al. 2017,
    arXiv:1709.01507: squeeze and excitation)."""

    kind = "gate"

    def fits(self, *inputs: Shape) -> bool:
        return inputs[1:] == ((1, 1, inputs[0][-1]),)


@dataclass(frozen=True, kw_only=True)
class Pad(Layer):
    """`amount` zeros on every side of a map, which count as its pixels do: in a maximum they win over what is negative.

    Before a convolution or an average it is what their own padding says; before a `MaxPool` nothing else says it.
    """

    amount: int
    kind = "pad"
    exact = True

    def output_shape(self, *inputs: Shape) -> Shape:
        height, width, channels = inputs[0]
        return (height + 2 * self.amount, width + 2 * self.amount, channels)


@dataclass(frozen=True, kw_only=True)
class MaxPool(Window):
    """Maximum over a window; padding never wins."""

    kind = "max_pool"
    exact = True


@dataclass(frozen=True, kw_only=True)
class AveragePool(Window):
    """Average over a window: of all its cells, those in the padding as zeros, or of those in the image alone.

    By default PyTorch and Flax count the padding, and Keras does not: the corner of a map of ones is 4/9 or 1 under a
    3x3 window. What ``ceil`` adds never counts.
    """

    count_padding: bool
    kind = "average_pool"


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
    """Average or maximum over all pixels, as features or, to `keep` the axes, as a map of one pixel."""

    op: Literal["average", "max"]
    keep: bool = False
    kind = "global_pool"

    def output_shape(self, *inputs: Shape) -> Shape:
        return (1, 1, inputs[0][-1]) if self.keep else inputs[0][-1:]


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

    def mask_shape(self, output: Shape) -> Shape:
        """Shape of what is drawn for an image, for an output of this shape."""
        return output


@dataclass(frozen=True, kw_only=True)
class StochasticDepth(Dropout):
    """In training a whole image, in a residual branch, is zero with probability `rate`, and otherwise divided by
    1 - `rate` (Huang et al. 2016, arXiv:1603.09382, as EfficientNet has it); nothing in eval mode."""

    kind = "stochastic_depth"

    def mask_shape(self, output: Shape) -> Shape:
        return (1,) * len(output)


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
    def trained(self) -> dict[str, Shape]:
        return {"kernel": (self.in_features, self.out_features), "bias": (self.out_features,)}

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

    Raises `InputError` where the image is too small, or where branches do not meet, and `SpecError` where a layer
    shares arrays that no earlier one holds.
    """
    shapes: dict[str, Shape] = {INPUT: image}
    holders: dict[str, dict[str, Shape]] = {}
    for layer in layers:
        if layer.shares is None:
            holders[layer.path] = layer.trained | layer.averaged
        elif holders.get(layer.shares) != layer.trained | layer.averaged:
            raise SpecError(f"{layer.path} shares the arrays of {layer.shares}, which is no earlier layer of its kind")
        inputs = [shapes[path] for path in layer.inputs]
        shape = layer.output_shape(*inputs)
        size = f"{image[0]}x{image[1]}"
        if min(shape) < 1:
            raise InputError(f"input size {size} is too small: nothing is left of it at {layer.path}; use a larger one")
        if not layer.fits(*inputs):
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
