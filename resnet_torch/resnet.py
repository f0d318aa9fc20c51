"""ResNet in PyTorch, under torchvision's names: its checkpoints load with ``strict=True``, its feature names hold.

He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385). Images are (N, channels, H, W).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.architectures.layers import Dense
from common.architectures.resnet import VARIANTS, ResNetSpec
from common.checkpoints import Given, adopt, weights_for
from common.names.resnet import TORCHVISION
from resnet_torch.layers import (
    Node,
    NormLayer,
    SqueezeExcitation,
    ZeroPadShortcut,
    avg_pool2d,
    batch_norm2d,
    conv2d,
    max_pool2d,
)
from resnet_torch.weights import load_weights


def _conv_layer(spec: ResNetSpec) -> Callable[..., nn.Conv2d]:
    return partial(conv2d, padding=spec.block_padding, bias=spec.conv_bias)


def _norm_layer(spec: ResNetSpec) -> NormLayer:
    if not spec.norm:
        return lambda channels: nn.Identity()
    return batch_norm2d(eps=spec.bn_eps, momentum=spec.bn_momentum, running_variance=spec.running_variance)


def _downsample(spec: ResNetSpec, in_channels: int, out_channels: int, stride: int, norm_layer: NormLayer) -> nn.Module:
    if spec.shortcut == "zero_pad":
        return ZeroPadShortcut(stride, out_channels - in_channels)
    downsample = nn.Sequential()
    if spec.shortcut_pool:
        # One that does nothing too, since the modules are numbered.
        pool = avg_pool2d(2, 2, padding="ceil", count_padding=False) if stride != 1 else nn.Identity()
        downsample.append(pool)
        stride = 1
    downsample.append(_conv_layer(spec)(in_channels, out_channels, 1, stride))
    return downsample.append(norm_layer(out_channels)) if spec.shortcut_norm else downsample


def _stem(spec: ResNetSpec, norm_layer: NormLayer) -> nn.Module:
    """The stem's convolution, with those before it where there are any: timm's `conv1.0`, `conv1.3`, …"""
    stem, channels, stride = nn.Sequential(), spec.in_channels, spec.stem_stride
    for width in (*spec.deep_stem, spec.stem_width):
        if stem:
            stem.extend([norm_layer(channels), nn.ReLU(inplace=True)])
        conv = conv2d(channels, width, spec.stem_kernel, stride, padding=spec.stem_padding, bias=spec.conv_bias)
        stem.append(conv)
        channels, stride = width, 1
    return stem if spec.deep_stem else stem[0]


class Place(NamedTuple):
    """Where a block stands: its stage, and strides and dilations of its first two convolutions."""

    stage: int
    strides: tuple[int, int]
    dilations: tuple[int, int]


def _place(spec: ResNetSpec, stage: int, stride: int, before: int, after: int) -> Place:
    # A convolution keeps the dilation it had up to the one whose stride was taken away, and doubles after it.
    if spec.stride_in == "conv2":
        return Place(stage, (1, stride), (before, before))
    return Place(stage, (stride, 1), (before, after))


class Block(nn.Module):
    """What both kinds have behind their last norm."""

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.relu_before_add, self.relu_after_add = spec.relu_before_add, spec.relu_after_add
        self.residual = spec.shortcut != "none"

    def _end(self, spec: ResNetSpec, in_channels: int, channels: int, place: Place, norm_layer: NormLayer) -> None:
        self.se = SqueezeExcitation(channels, spec.squeeze[place.stage]) if spec.squeeze else None
        stride = max(place.strides)
        self.projects = stride > 1 or in_channels != channels
        self.downsample = None
        if self.residual and (self.projects or spec.unused_projection):
            self.downsample = _downsample(spec, in_channels, channels, stride, norm_layer)

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        if self.se is not None:
            out = self.se(out)
        if self.relu_before_add:
            out = self.relu(out)
        if self.residual:
            shortcut = x if self.downsample is None or not self.projects else self.downsample(x)
            if self.relu_before_add:
                out = out + shortcut  # not in place: that ReLU keeps its output for the backward pass
            else:
                out += shortcut
        return self.relu(out) if self.relu_after_add else out


class BasicBlock(Block):
    """Two 3x3 convolutions: the block of ResNet-18 and -34, and of the CIFAR networks."""

    def __init__(self, spec: ResNetSpec, in_channels: int, width: int, place: Place, norm_layer: NormLayer) -> None:
        super().__init__(spec)
        conv = _conv_layer(spec)
        self.conv1 = conv(in_channels, width, 3, place.strides[0], dilation=place.dilations[0])
        self.bn1 = norm_layer(width)
        # None: the first one again, where they are alike.
        alike = in_channels == width and len({*place.strides}) == len({*place.dilations}) == 1
        again = spec.shared == "conv" and alike
        self.conv2 = None if again else conv(width, width, 3, place.strides[1], dilation=place.dilations[1])
        self.bn2 = None if again or spec.shared == "norm" else norm_layer(width)
        self._end(spec, in_channels, width, place, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.conv1(out) if self.conv2 is None else self.conv2(out)
        out = self.bn1(out) if self.bn2 is None else self.bn2(out)
        return self.merge(out, x)


class Bottleneck(Block):
    """1x1 down, 3x3, 1x1 up: the block of ResNet-50 and deeper.

    torchvision strides the 3x3 ("v1.5"), the paper the first 1x1.
    """

    def __init__(self, spec: ResNetSpec, in_channels: int, width: int, place: Place, norm_layer: NormLayer) -> None:
        super().__init__(spec)
        inner, out_channels = spec.inner_width(width), width * spec.expansion
        conv = _conv_layer(spec)
        self.conv1 = conv(in_channels, inner, 1, place.strides[0])
        self.bn1 = norm_layer(inner)
        self.conv2 = conv(inner, inner, 3, place.strides[1], dilation=place.dilations[1], groups=spec.groups)
        self.bn2 = None if spec.shared == "norm" else norm_layer(inner)  # None: the first one again
        self.conv3 = conv(inner, out_channels, 1)
        self.bn3 = norm_layer(out_channels)
        self._end(spec, in_channels, out_channels, place, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        out = self.relu(self.bn1(out) if self.bn2 is None else self.bn2(out))
        out = self.bn3(self.conv3(out))
        return self.merge(out, x)


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
        self.conv1 = _stem(spec, norm_layer)
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
                stage.append(block(spec, channels, width, _place(spec, s, stride, before, dilation), norm_layer))
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
    table: dict[str, Node] = {}
    calls: Counter[str] = Counter()  # of modules that are called again
    for layer in spec.layers:
        block, _, part = layer.path.rpartition(".")
        if part == "add":
            name = names[f"{block}.conv1"].rpartition(".")[0]
            relu = Node(f"{name}.add", f"{name}.relu", calls[f"{name}.relu"], "input")
            table[layer.path] = relu if spec.relu_after_add else Node(f"{name}.add", name)
        elif part == "flatten":
            table[layer.path] = Node("flatten", "avgpool")
        else:
            name = names[layer.path]
            call, leaf = calls[name], f"{name}.mul" if layer.kind == "gate" else name
            table[layer.path] = Node(f"{leaf}_{call}" if call else leaf, name, call)
            calls[name] += 1
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
