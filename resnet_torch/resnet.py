"""ResNet in PyTorch, under torchvision's names: its checkpoints load with ``strict=True``, its feature names hold.

He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385). Images are (N, channels, H, W).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.architectures.layers import Dense
from common.architectures.resnet import VARIANTS, ResNetSpec
from common.checkpoints import Given, adopt, weights_for
from common.names.resnet import TORCHVISION
from resnet_torch.layers import Node, NormLayer, batch_norm2d, conv2d, max_pool2d
from resnet_torch.weights import load_weights


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
) -> nn.Conv2d:
    return conv2d(
        in_channels,
        out_channels,
        kernel,
        stride,
        padding=spec.block_padding,
        dilation=dilation,
        groups=groups,
        bias=spec.conv_bias,
    )


def _norm_layer(spec: ResNetSpec) -> NormLayer:
    if not spec.norm:
        return lambda channels: nn.Identity()
    return batch_norm2d(eps=spec.bn_eps, momentum=spec.bn_momentum, running_variance=spec.running_variance)


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
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up: the block of ResNet-50 and deeper.

    torchvision strides the 3x3 ("v1.5"), the paper the first 1x1.
    """

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
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
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
        self.conv1 = conv2d(
            spec.in_channels,
            spec.stem_width,
            spec.stem_kernel,
            spec.stem_stride,
            padding=spec.stem_padding,
            bias=spec.conv_bias,
        )
        self.bn1 = norm_layer(spec.stem_width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = max_pool2d(3, 2, padding=spec.pool_padding) if spec.stem_pool else nn.Identity()

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
                if isinstance(scale := getattr(last, "weight", None), Tensor):
                    nn.init.zeros_(scale)

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


def nodes(spec: ResNetSpec) -> dict[str, Node]:
    """Canonical path of every layer of the walk -> its node; `Node.module` names the module that holds its arrays."""
    names = TORCHVISION.layers(spec)
    last = 2 if spec.block == "bottleneck" else 1
    calls = {f"relu{i + 1}": i for i in range(last)} | {"relu": last}
    table: dict[str, Node] = {}
    for layer in spec.layers:
        part = layer.path.rpartition(".")[2]
        if part == "add":
            relu = names[f"{layer.path.removesuffix('add')}relu"]
            table[layer.path] = Node(f"{relu.removesuffix('relu')}add", relu, last, "input")
        elif part == "flatten":
            table[layer.path] = Node("flatten", "avgpool")
        else:
            name = names[layer.path]
            call = calls.get(part, 0) if "blocks" in layer.path else 0  # the stem's is another module
            table[layer.path] = Node(f"{name}_{call}" if call else name, name, call)
    return table


def from_spec(
    spec: ResNetSpec,
    *,
    weights: Given | None = None,
    norm_layer: NormLayer | None = None,
    zero_init_residual: bool = False,
) -> ResNet:
    """The model of any valid spec, with `weights` if there are any: a reference to a checkpoint of any known format, a
    checkpoint that was read, or arrays by canonical name.

    Raises `WeightsError` if they are not there, damaged, or of another spec.
    """
    model = ResNet(spec, norm_layer, zero_init_residual)
    if weights is not None:
        load_weights(model, weights_for(spec, weights))
    return model


def builder(name: str) -> Callable[..., ResNet]:
    """The public function that makes a named variant, with the keywords of torchvision."""
    variant = VARIANTS[name]

    def build(
        *,
        weights: Given | None = None,
        progress: bool = True,
        num_classes: int = variant.classes,
        zero_init_residual: bool = False,
        groups: int = variant.groups,
        width_per_group: int = variant.width_per_group,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> ResNet:
        spec, weights = adopt(variant, weights, name, progress=progress)
        spec = spec.replace(
            classes=num_classes,
            groups=groups,
            width_per_group=width_per_group,
            replace_stride_with_dilation=replace_stride_with_dilation,
        )
        return from_spec(spec, weights=weights, norm_layer=norm_layer, zero_init_residual=zero_init_residual)

    build.__doc__ = f"""{name}: stages of {", ".join(map(str, variant.blocks))} {variant.block} blocks.

    The keywords are torchvision's. `weights` is the path of a checkpoint of any known format, a URL, or a name as
    "torchvision:IMAGENET1K_V2", "keras:imagenet" and "hf://timm/resnet50.a1_in1k"; the network takes its conventions.
    `progress` shows a download's, as a bar on standard error. Raises `SpecError` for values the network cannot have,
    `WeightsError` for weights that cannot be had or are another network's.
    """
    return build
