"""ResNet in PyTorch, under torchvision's names: its checkpoints load with ``strict=True``, its feature names hold.

He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385). Images are (N, channels, H, W).
"""

from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from os import PathLike
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.architectures.layers import Dense, Padding
from common.architectures.resnet import VARIANTS, ResNetSpec
from resnet_torch.weights import load_file

NormLayer = Callable[[int], nn.Module]


def pad_same(x: Tensor, kernel: int, stride: int, dilation: int, value: float) -> Tensor:
    """Pad (N, C, H, W) so that a window then yields ceil(size / stride) values, the odd one out below and right."""
    height, width = x.size(2), x.size(3)
    rows = max(((height + stride - 1) // stride - 1) * stride + dilation * (kernel - 1) + 1 - height, 0)
    columns = max(((width + stride - 1) // stride - 1) * stride + dilation * (kernel - 1) + 1 - width, 0)
    return F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2], value=value)


class SameConv2d(nn.Conv2d):
    """`nn.Conv2d` with TensorFlow's SAME padding, which depends on the input size where the stride is not 1."""

    def forward(self, input: Tensor) -> Tensor:
        padded = pad_same(input, self.kernel_size[0], self.stride[0], self.dilation[0], 0.0)
        return self._conv_forward(padded, self.weight, self.bias)


class SameMaxPool2d(nn.Module):
    """Max-pooling with TensorFlow's SAME padding; the padding never wins."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, input: Tensor) -> Tensor:
        return F.max_pool2d(
            pad_same(input, self.kernel_size, self.stride, 1, -torch.inf), self.kernel_size, self.stride
        )


class BiasedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that averages the variance it normalises with (divided by N), as Keras and Flax do.

    PyTorch itself normalises with that one and averages the unbiased one, divided by N - 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        running_mean, running_var, counter = self.running_mean, self.running_var, self.num_batches_tracked
        if not self.training or running_mean is None or running_var is None or counter is None:
            return F.batch_norm(
                input, running_mean, running_var, self.weight, self.bias, running_var is None, 0.0, self.eps
            )
        counter.add_(1)
        momentum = 1.0 / float(counter) if self.momentum is None else self.momentum
        count = input.numel() // input.size(1)
        unbiasing = count / max(count - 1, 1)
        # Let PyTorch average in unbiased units, in a tensor of its own: autograd keeps the one it is given.
        unbiased = running_var * unbiasing
        output = F.batch_norm(input, running_mean, unbiased, self.weight, self.bias, True, momentum, self.eps)
        running_var.copy_(unbiased / unbiasing)
        return output


class ZeroPadShortcut(nn.Module):
    """Option A of the paper, section 3.3: every `stride`-th pixel, `extra` channels of zeros after the others."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], [0, 0, 0, 0, 0, self.extra])


def _conv(
    spec: ResNetSpec,
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    padding: Padding | None = None,
) -> nn.Conv2d:
    padding = padding or spec.block_padding
    # SAME is symmetric at stride 1, and nothing for a 1x1 kernel; only elsewhere does it depend on the size.
    same = padding == "same" and kernel > 1 and (stride > 1 or kernel % 2 == 0)
    return (SameConv2d if same else nn.Conv2d)(
        in_channels,
        out_channels,
        kernel,
        stride,
        padding=0 if same or padding == "valid" else dilation * (kernel - 1) // 2,
        dilation=dilation,
        groups=groups,
        bias=spec.conv_bias,
    )


def _max_pool(padding: Padding) -> nn.Module:
    if padding == "same":
        return SameMaxPool2d(kernel_size=3, stride=2)
    return nn.MaxPool2d(kernel_size=3, stride=2, padding=int(padding == "symmetric"), ceil_mode=padding == "ceil")


def _norm_layer(spec: ResNetSpec) -> NormLayer:
    if not spec.norm:
        return lambda channels: nn.Identity()
    # PyTorch's momentum is the share of the new value. Taken in decimals, 0.9 gives 0.1; in binary 0.09999999999999998.
    momentum = float(1 - Decimal(repr(spec.bn_momentum)))
    batch_norm = BiasedBatchNorm2d if spec.running_variance == "biased" else nn.BatchNorm2d
    return partial(batch_norm, eps=spec.bn_eps, momentum=momentum)


def _downsample(
    spec: ResNetSpec, in_channels: int, out_channels: int, stride: int, norm_layer: NormLayer
) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    if spec.shortcut == "zero_pad":
        return ZeroPadShortcut(stride, out_channels - in_channels)
    projection = _conv(spec, in_channels, out_channels, kernel=1, stride=stride)
    return nn.Sequential(projection, norm_layer(out_channels)) if spec.shortcut_norm else nn.Sequential(projection)


class Place(NamedTuple):
    """Strides and dilations of a block's first two convolutions."""

    stride1: int
    stride2: int
    dilation1: int
    dilation2: int

    @property
    def stride(self) -> int:
        return self.stride1 * self.stride2


def _place(spec: ResNetSpec, stride: int, before: int, after: int) -> Place:
    # A convolution keeps the dilation it had up to the one whose stride was taken away, and doubles after it.
    if spec.stride_in == "conv2":
        return Place(1, stride, before, before)
    return Place(stride, 1, before, after)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: the block of ResNet-18 and -34, and of the CIFAR networks."""

    def __init__(self, spec: ResNetSpec, in_channels: int, width: int, place: Place, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv1 = _conv(spec, in_channels, width, 3, place.stride1, place.dilation1)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(spec, width, width, 3, place.stride2, place.dilation2)
        self.bn2 = norm_layer(width)
        self.downsample = _downsample(spec, in_channels, width, place.stride, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up: the block of ResNet-50 and deeper. torchvision strides the 3x3 ("v1.5"), the paper the 1x1."""

    def __init__(self, spec: ResNetSpec, in_channels: int, width: int, place: Place, norm_layer: NormLayer) -> None:
        super().__init__()
        inner, out_channels = spec.inner_width(width), width * spec.expansion
        self.conv1 = _conv(spec, in_channels, inner, 1, place.stride1)
        self.bn1 = norm_layer(inner)
        self.conv2 = _conv(spec, inner, inner, 3, place.stride2, place.dilation2, spec.groups)
        self.bn2 = norm_layer(inner)
        self.conv3 = _conv(spec, inner, out_channels, 1)
        self.bn3 = norm_layer(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(spec, in_channels, out_channels, place.stride, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """The network of `spec`; stages are `layer1`, `layer2`, … as many as it has.

    `norm_layer` makes a norm from a number of channels, in place of the spec's own batch norm.
    `zero_init_residual` zeroes the last scale of each block (arXiv:1706.02677, section 5.1). Otherwise initialised
    as torchvision does: Kaiming-normal over fan_out, norms one and zero, the dense layer uniform.
    """

    def __init__(self, spec: ResNetSpec, norm_layer: NormLayer | None = None, zero_init_residual: bool = False) -> None:
        super().__init__()
        self.spec = spec
        norm_layer = norm_layer or _norm_layer(spec)
        self.conv1 = _conv(
            spec, spec.in_channels, spec.stem_width, spec.stem_kernel, spec.stem_stride, padding=spec.stem_padding
        )
        self.bn1 = norm_layer(spec.stem_width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = _max_pool(spec.pool_padding) if spec.stem_pool else nn.Identity()

        block = Bottleneck if spec.block == "bottleneck" else BasicBlock
        channels, dilation = spec.stem_width, 1
        dilated = (False, *spec.replace_stride_with_dilation)
        for s, (count, width) in enumerate(zip(spec.blocks, spec.widths, strict=True)):
            stage = nn.Sequential()
            for b in range(count):
                stride = spec.stage_strides[s] if b == 0 else 1
                before, dilation = dilation, dilation * 2 if dilated[s] and b == 0 else dilation
                stage.append(block(spec, channels, width, _place(spec, stride, before, dilation), norm_layer))
                channels = width * spec.expansion
            self.add_module(f"layer{s + 1}", stage)

        pools = {"average": nn.AdaptiveAvgPool2d, "max": nn.AdaptiveMaxPool2d}
        self.avgpool = pools[spec.head_pool]((1, 1)) if spec.head_pool in pools else nn.Identity()
        self.flattens = spec.head_pool != "none"
        features = next((layer.in_features for layer in spec.layers if isinstance(layer, Dense)), channels)
        self.fc = nn.Identity() if spec.head == "none" else nn.Linear(features, spec.classes)
        self.softmax = nn.Softmax(dim=1) if spec.head == "softmax" else None
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                if isinstance(last.weight, Tensor):
                    nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.stages(x)[-1])
        if self.flattens:
            x = torch.flatten(x, 1)
        x = self.fc(x)
        return x if self.softmax is None else self.softmax(x)

    @torch.jit.export
    def stages(self, x: Tensor) -> list[Tensor]:
        """Every stage's output, (N, channels, H, W) each: C2 to C5 of a feature pyramid for four stages."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        outputs: list[Tensor] = []
        for name, module in self.named_children():
            if name.startswith("layer"):
                x = module(x)
                outputs.append(x)
        return outputs


class Node(NamedTuple):
    """Where the output of a layer of the walk is found: `name` is torchvision's node name for it.

    It is the `value` of the `call`-th call of `module` in one forward pass: a block calls its one `relu` several times,
    and an addition, which is no module, is what the last of these calls reads.
    """

    name: str
    module: str
    call: int = 0
    value: Literal["output", "input"] = "output"


_STEM = {"conv": "conv1", "norm": "bn1", "relu": "relu", "pool": "maxpool"}
_HEAD = {"pool": "avgpool", "fc": "fc", "softmax": "softmax"}
_BLOCK = {f"conv{i}": f"conv{i}" for i in (1, 2, 3)} | {f"norm{i}": f"bn{i}" for i in (1, 2, 3)}
_BLOCK |= {"shortcut.conv": "downsample.0", "shortcut.norm": "downsample.1", "shortcut.pad": "downsample"}


def nodes(spec: ResNetSpec) -> dict[str, Node]:
    """Canonical path of every layer of the walk -> its node; `Node.module` names the module that holds its arrays."""
    last = 2 if spec.block == "bottleneck" else 1
    table: dict[str, Node] = {}
    for layer in spec.layers:
        where, _, role = layer.path.partition(".")
        if where == "stages":
            stage, _, block, role = role.split(".", 3)
            prefix = f"layer{int(stage) + 1}.{block}."
            calls = {f"relu{i + 1}": i for i in range(last)} | {"relu": last}
            if role == "add":
                table[layer.path] = Node(f"{prefix}add", f"{prefix}relu", last, "input")
            elif role in calls:
                call = calls[role]
                table[layer.path] = Node(f"{prefix}relu_{call}" if call else f"{prefix}relu", f"{prefix}relu", call)
            else:
                table[layer.path] = Node(prefix + _BLOCK[role], prefix + _BLOCK[role])
        elif role == "flatten":
            table[layer.path] = Node("flatten", "avgpool")
        else:
            name = (_STEM if where == "stem" else _HEAD)[role]
            table[layer.path] = Node(name, name)
    return table


def from_spec(
    spec: ResNetSpec,
    *,
    weights: str | PathLike[str] | None = None,
    norm_layer: NormLayer | None = None,
    zero_init_residual: bool = False,
) -> ResNet:
    """The model of any valid spec, with the weights of a canonical safetensors file if `weights` names one.

    Raises `WeightsError` if that file is not there, is damaged, or holds the weights of another spec.
    """
    model = ResNet(spec, norm_layer, zero_init_residual)
    if weights is not None:
        load_file(model, weights)
    return model


def _builder(name: str) -> Callable[..., ResNet]:
    variant = VARIANTS[name]

    def build(
        *,
        weights: str | PathLike[str] | None = None,
        progress: bool = True,
        num_classes: int = variant.classes,
        zero_init_residual: bool = False,
        groups: int = variant.groups,
        width_per_group: int = variant.width_per_group,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> ResNet:
        spec = variant.replace(
            classes=num_classes,
            groups=groups,
            width_per_group=width_per_group,
            replace_stride_with_dilation=replace_stride_with_dilation,
        )
        return from_spec(spec, weights=weights, norm_layer=norm_layer, zero_init_residual=zero_init_residual)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{name}: stages of {", ".join(map(str, variant.blocks))} {variant.block} blocks.

    The keywords are torchvision's. `weights` is the path of a canonical safetensors file; `progress` is accepted and
    unused, as nothing is downloaded. Raises `SpecError` for values the network cannot have, `WeightsError` as
    `from_spec` does.
    """
    return build


resnet18 = _builder("resnet18")
resnet34 = _builder("resnet34")
resnet50 = _builder("resnet50")
resnet101 = _builder("resnet101")
resnet152 = _builder("resnet152")
wide_resnet50_2 = _builder("wide_resnet50_2")
wide_resnet101_2 = _builder("wide_resnet101_2")
resnext50_32x4d = _builder("resnext50_32x4d")
resnext101_32x8d = _builder("resnext101_32x8d")
resnext101_64x4d = _builder("resnext101_64x4d")
# The networks for CIFAR of the paper, section 4.2.
resnet20 = _builder("resnet20")
resnet32 = _builder("resnet32")
resnet44 = _builder("resnet44")
resnet56 = _builder("resnet56")
resnet110 = _builder("resnet110")
