"""What every family of this backend is made of: padding by name, norms, and where a layer's output is found."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from functools import partial
from importlib import import_module
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from common.architectures import Spec
from common.architectures.layers import Activation, Padding, RunningVariance, Shape, sides_of

NormLayer = Callable[[int], nn.Module]


def pad_same(x: Tensor, height: int, width: int, stride: int, dilation: int, value: float) -> Tensor:
    """Pad (N, C, H, W) so that a window of height and width then yields ceil(size / stride) values, the odd one out
    below and right."""
    rows = max(dilation * (height - 1) - (x.size(2) - 1) % stride, 0)
    columns = max(dilation * (width - 1) - (x.size(3) - 1) % stride, 0)
    padded: Tensor = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2], value=value)
    return padded


class SameConv2d(nn.Conv2d):
    """`nn.Conv2d` with TensorFlow's SAME padding, which depends on the input size where the stride is not 1."""

    def forward(self, input: Tensor) -> Tensor:
        padded = pad_same(input, self.kernel_size[0], self.kernel_size[1], self.stride[0], self.dilation[0], 0.0)
        return self._conv_forward(padded, self.weight, self.bias)


class SameMaxPool2d(nn.Module):
    """Max-pooling with TensorFlow's SAME padding; the padding never wins."""

    def __init__(self, kernel_size: tuple[int, int], stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, input: Tensor) -> Tensor:
        padded = pad_same(input, self.kernel_size[0], self.kernel_size[1], self.stride, 1, -torch.inf)
        return F.max_pool2d(padded, self.kernel_size, self.stride)


class SameAvgPool2d(nn.Module):
    """Average pooling with TensorFlow's SAME padding, which counts as zeros only with `count_include_pad`."""

    def __init__(self, kernel_size: tuple[int, int], stride: int, count_include_pad: bool) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.count_include_pad = kernel_size, stride, count_include_pad

    def forward(self, input: Tensor) -> Tensor:
        averages = self._averages(input)
        return averages if self.count_include_pad else averages / self._averages(torch.ones_like(input[:1, :1]))

    def _averages(self, x: Tensor) -> Tensor:
        padded = pad_same(x, self.kernel_size[0], self.kernel_size[1], self.stride, 1, 0.0)
        return F.avg_pool2d(padded, self.kernel_size, self.stride)


class ScaledTanh(nn.Module):
    """1.7159 tanh(2 x / 3), of LeCun et al. 1998."""

    def forward(self, input: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(input * (2 / 3))


ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "relu6": partial(nn.ReLU6, inplace=True),
    "tanh": nn.Tanh,
    "scaled_tanh": ScaledTanh,
    "sigmoid": nn.Sigmoid,
    "silu": partial(nn.SiLU, inplace=True),
}


class StochasticDepth(nn.Module):
    """Sets whole images (N, C, H, W) to zero in training, with probability `p`, and divides the others by 1 - p:
    torchvision's of mode "row"."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        return input * F.dropout(torch.ones_like(input[:, :1, :1, :1]), self.p)


class Affine(nn.Module):
    """x * scale + shift for each channel of (N, C, H, W). Plain numbers: nothing in the state, exact in every dtype."""

    def __init__(self, scale: Sequence[float], shift: Sequence[float]) -> None:
        super().__init__()
        self.scale, self.shift = list(scale), list(shift)

    def forward(self, input: Tensor) -> Tensor:
        channels: list[Tensor] = []
        for i, (scale, shift) in enumerate(zip(self.scale, self.shift)):  # noqa: B905  TorchScript has no `strict`
            channels.append(input[:, i] * scale + shift)
        return torch.stack(channels, dim=1)


class ZeroPadShortcut(nn.Module):
    """Option A of the paper, section 3.3: every `stride`-th pixel, `extra` channels of zeros after the others."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], [0, 0, 0, 0, 0, self.extra])


class SqueezeExcitation(nn.Module):
    """Each channel times a number that all channels' averages give (Hu et al. 2017, arXiv:1709.01507): torchvision's,
    whose convolutions timm calls the same."""

    def __init__(
        self, channels: int, width: int, activation: Activation = "relu", gate_activation: Activation = "sigmoid"
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, width, 1)
        self.fc2 = nn.Conv2d(width, channels, 1)
        self.activation = ACTIVATIONS[activation]()
        self.scale_activation = ACTIVATIONS[gate_activation]()

    def forward(self, input: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(input)))
        return self.scale_activation(self.fc2(scale)) * input


def biased_batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """`F.batch_norm` in training mode, but that the running variance is the biased one.

    As in PyTorch, `momentum` is the share of the new value, or None for the plain average of all batches.
    """
    num_batches_tracked.add_(1)
    share = 1.0 / float(num_batches_tracked) if momentum is None else momentum
    count = input.numel() // input.size(1)
    biasing = (count - 1) / count
    # Let PyTorch average in unbiased units, in a tensor of its own: autograd keeps the one it is given.
    unbiased = running_var / biasing
    output = F.batch_norm(input, running_mean, unbiased, weight, bias, True, share, eps)
    running_var.copy_(unbiased * biasing)
    return output


class BiasedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that averages the variance it normalises with (divided by N), as Keras and Flax do.

    PyTorch itself normalises with that one and averages the unbiased one, divided by N - 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        mean, var, counter = self.running_mean, self.running_var, self.num_batches_tracked
        if not self.training or mean is None or var is None or counter is None:
            return F.batch_norm(input, mean, var, self.weight, self.bias, mean is None, 0.0, self.eps)
        return biased_batch_norm(input, mean, var, counter, self.weight, self.bias, self.momentum, self.eps)


# Each is one node of a graph traced by torch.fx, which cannot follow arithmetic on sizes.
torch.fx.wrap("pad_same")
torch.fx.wrap("biased_batch_norm")


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel: int | tuple[int, int],
    stride: int = 1,
    *,
    padding: Padding | int,
    dilation: int = 1,
    groups: int = 1,
    bias: bool,
) -> nn.Conv2d:
    """A convolution padded by name or number; a plain `nn.Conv2d` wherever that can express it."""
    # SAME is symmetric at stride 1, and nothing for a 1x1 kernel; only elsewhere does it depend on the size.
    sides = sides_of(kernel)
    same = padding == "same" and any(side > 1 and (stride > 1 or side % 2 == 0) for side in sides)
    return (SameConv2d if same else nn.Conv2d)(
        in_channels,
        out_channels,
        sides,
        stride,
        padding=0 if same else _static_padding(padding, sides, dilation),
        dilation=dilation,
        groups=groups,
        bias=bias,
    )


def max_pool2d(kernel: int | tuple[int, int], stride: int, *, padding: Padding | int) -> nn.Module:
    """A max-pool padded by name or number; a plain `nn.MaxPool2d` wherever that can express it."""
    if padding == "same":
        return SameMaxPool2d(sides_of(kernel), stride)
    # A number where the sides are equal, as in torchvision, so that models print alike.
    pads = _static_padding(padding, sides_of(kernel))
    return nn.MaxPool2d(kernel, stride, padding=pads, ceil_mode=padding == "ceil")


def avg_pool2d(kernel: int | tuple[int, int], stride: int, *, padding: Padding | int, count_padding: bool) -> nn.Module:
    """An average pool padded by name or number; a plain `nn.AvgPool2d` wherever that can express it."""
    sides = sides_of(kernel)
    if padding == "same" and (stride > 1 or any(side % 2 == 0 for side in sides)):
        return SameAvgPool2d(sides, stride, count_padding)
    pads = _static_padding(padding, sides)
    # PyTorch never counts what `ceil_mode` adds.
    return nn.AvgPool2d(kernel, stride, padding=pads, ceil_mode=padding == "ceil", count_include_pad=count_padding)


def _static_padding(padding: Padding | int, sides: tuple[int, int], dilation: int = 1) -> int | tuple[int, int]:
    """Rows and columns on either side, of what pads by its size alone; one number where they are equal."""
    if isinstance(padding, int):
        return padding
    if padding in ("valid", "ceil"):
        return 0
    rows, columns = (dilation * (side - 1) // 2 for side in sides)
    return rows if rows == columns else (rows, columns)


def local_response_norm(size: int, *, alpha: float, beta: float, k: float) -> nn.LocalResponseNorm:
    """A local response norm of `alpha` as in a spec: PyTorch divides its own by `size`."""
    return nn.LocalResponseNorm(size, alpha * size, beta, k)


def batch_norm2d(*, eps: float, momentum: float, running_variance: RunningVariance, scale: bool = True) -> NormLayer:
    """Makes batch norms; `momentum` is the share of the old value, as in a spec."""
    # PyTorch's is the share of the new value. Taken in decimals, 0.9 gives 0.1; in binary 0.09999999999999998.
    share = float(1 - Decimal(repr(momentum)))
    layer = BiasedBatchNorm2d if running_variance == "biased" else nn.BatchNorm2d
    return partial(layer if scale else partial(_unscaled, layer), eps=eps, momentum=share)


def _unscaled(layer: type[nn.BatchNorm2d], channels: int, **options: Any) -> nn.BatchNorm2d:
    """A batch norm with a bias alone, for which PyTorch has no option."""
    norm = layer(channels, **options)
    norm.register_parameter("weight", None)
    return norm


def native_masks(spec: Spec, masks: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Masks of dropout and stochastic depth by the name of the module, in PyTorch's layout."""
    if not masks:
        return {}
    places, found = nodes(spec), {}
    for path, mask in masks.items():
        tensor, place = torch.tensor(mask, device=device), places[path]
        if place.flattened is not None:
            tensor = tensor.unflatten(1, place.flattened).permute(0, 3, 1, 2).flatten(1)
        found[place.module] = tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor
    return found


@contextmanager
def given_dropout(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, each `nn.Dropout` and `StochasticDepth`, by its name in the model, keeps in training the values
    where its mask is True.

    A mask is of the shape of the layer's output, (N, 1, 1, 1) for stochastic depth.
    """
    with ExitStack() as hooks:
        for name, mask in masks.items():
            hooks.callback(model.get_submodule(name).register_forward_hook(partial(_masked, mask)).remove)
        yield


def _masked(mask: Tensor, module: nn.Dropout | StochasticDepth, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return torch.where(mask, inputs[0] / (1 - module.p), 0) if module.training else output


def nodes(spec: Spec) -> "dict[str, Node]":
    """Where the output of every layer of the walk is found in the model that its family makes."""
    found: dict[str, Node] = import_module(f"{__package__}.{spec.family}").nodes(spec)
    return found


class Node(NamedTuple):
    """Where the output of a layer of the walk is found: `name` is torchvision's node name for it.

    It is the `value` of the `call`-th call of `module` in one forward pass: a block calls its one `relu` several times,
    and an addition, which is no module, is what the last of these calls reads.
    """

    name: str
    module: str
    call: int = 0
    value: Literal["output", "input"] = "output"
    flattened: Shape | None = (
        None  # (height, width, channels) of a map that PyTorch has flattened before, channels first
    )
