"""ResNet with pre-activation in PyTorch. torchvision has none: names are as in its ResNet, ``layers.0.0.bn1``.

He et al., "Identity Mappings in Deep Residual Networks", 2016 (arXiv:1603.05027). Images are (N, channels, H, W).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.architectures.resnet_v2 import VARIANTS, ResNetV2Spec
from common.checkpoints import Given, adopt, weights_for
from common.names.resnet_v2 import TORCHVISION
from resnet_torch.layers import Node, NormLayer, batch_norm2d, conv2d, max_pool2d
from resnet_torch.weights import load_weights


def _norm_layer(spec: ResNetV2Spec) -> NormLayer:
    if not spec.norm:
        return lambda channels: nn.Identity()
    return batch_norm2d(eps=spec.bn_eps, momentum=spec.bn_momentum, running_variance=spec.running_variance)


class PreActBottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up, a norm and a ReLU before each. The first of a stage projects its shortcut; another one
    that strides takes every other pixel of it."""

    def __init__(
        self, spec: ResNetV2Spec, in_channels: int, width: int, stride: int, project: bool, norm_layer: NormLayer
    ) -> None:
        super().__init__()
        out_channels = width * spec.expansion
        stride1, stride2 = (stride, 1) if spec.stride_in == "conv1" else (1, stride)
        bias = spec.conv_bias and not spec.norm  # of a convolution that a norm follows
        self.stride, self.projects = stride, project
        self.bn1 = norm_layer(in_channels)
        self.conv1 = conv2d(in_channels, width, 1, stride1, padding="valid", bias=bias)
        self.bn2 = norm_layer(width)
        self.conv2 = conv2d(width, width, 3, stride2, padding="symmetric", bias=bias)
        self.bn3 = norm_layer(width)
        self.conv3 = conv2d(width, out_channels, 1, padding="valid", bias=spec.conv_bias)
        # In place of the norm's output; without a norm that would be the shortcut itself.
        self.relu = nn.ReLU(inplace=spec.norm)
        self.downsample: nn.Module | None = None
        if project:
            self.downsample = conv2d(in_channels, out_channels, 1, stride, padding="valid", bias=spec.conv_bias)
        elif stride > 1:
            self.downsample = nn.MaxPool2d(1, stride)

    def forward(self, x: Tensor) -> Tensor:
        preact = self.relu(self.bn1(x))
        shortcut = x
        if self.downsample is not None:
            # A projection reads what is normalised and activated, an identity what is not.
            shortcut = self.downsample(preact if self.projects else x)
        out = self.conv1(preact)
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))
        out += shortcut
        return out


class ResNetV2(nn.Module):
    """The network of `spec`; its stages are `layers`.

    Initialised as torchvision's ResNet: convolutions Kaiming-normal over fan_out, their biases zero, norms one and
    zero, the dense layer uniform. `zero_init_residual` zeroes the last kernel of each block, as timm does: no norm
    follows it.
    """

    def __init__(self, spec: ResNetV2Spec, zero_init_residual: bool = False) -> None:
        super().__init__()
        self.spec = spec
        norm_layer = _norm_layer(spec)
        self.conv1 = conv2d(
            spec.in_channels,
            spec.stem_width,
            spec.stem_kernel,
            spec.stem_stride,
            padding="symmetric",
            bias=spec.conv_bias,
        )
        self.pad, self.maxpool = _stem_pool(spec)
        # One module, not `layer1`, `layer2`, …: TorchScript can look into the stages of no other.
        self.layers = nn.Sequential()
        channels = spec.stem_width
        for s, (count, width) in enumerate(zip(spec.blocks, spec.widths, strict=True)):
            stage = nn.Sequential()
            for b in range(count):
                stage.append(PreActBottleneck(spec, channels, width, spec.stride(s, b), b == 0, norm_layer))
                channels = width * spec.expansion
            self.layers.append(stage)
        self.bn = norm_layer(channels)
        self.relu = nn.ReLU(inplace=spec.norm)

        pools = {"average": nn.AdaptiveAvgPool2d, "max": nn.AdaptiveMaxPool2d}
        self.avgpool = pools[spec.head_pool]((1, 1)) if spec.head_pool in pools else nn.Identity()
        self.flattens = spec.head_pool != "none"
        self.fc = nn.Identity() if spec.head == "none" else nn.Linear(channels, spec.classes)
        self.softmax = nn.Softmax(dim=1) if spec.head == "softmax" else None
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if zero_init_residual and isinstance(module, PreActBottleneck):
                nn.init.zeros_(module.conv3.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stages(x)[-1]))
        x = self.avgpool(x)
        if self.flattens:
            x = torch.flatten(x, 1)
        x = self.fc(x)
        return x if self.softmax is None else self.softmax(x)

    @torch.jit.export
    def stages(self, x: Tensor) -> list[Tensor]:
        """The last sum at each resolution, (N, channels, H, W) each: C2 to C5 of a feature pyramid for four stages.

        Where the last block of a stage strides, it is the sum before that block. No norm and no ReLU has seen it.
        """
        x = self.maxpool(self.pad(self.conv1(x)))
        outputs: list[Tensor] = []
        for stage in self.layers:
            for block in stage:  # type: ignore[attr-defined]
                if block.stride > 1:
                    outputs.append(x)
                x = block(x)
        # The norm and the ReLU behind the last one leave it as it is.
        outputs.append(x)
        return outputs


def _stem_pool(spec: ResNetV2Spec) -> tuple[nn.Module, nn.Module]:
    """What pads before the pool, and the pool."""
    if not spec.stem_pool:
        return nn.Identity(), nn.Identity()
    if spec.pool_padding != "zeros":
        return nn.Identity(), max_pool2d(3, 2, padding=spec.pool_padding)
    # No ReLU stands before it: these zeros win over negative values, where a pool's own padding never wins.
    return nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)


def nodes(spec: ResNetV2Spec) -> dict[str, Node]:
    """Canonical path of every layer of the walk -> its node; `Node.module` names the module that holds its arrays."""
    names = TORCHVISION.layers(spec)
    table: dict[str, Node] = {}
    for layer in spec.layers:
        part = layer.path.rpartition(".")[2]
        if layer.kind == "add":  # what the block returns
            block = names[f"{layer.path.removesuffix('add')}conv1"].removesuffix(".conv1")
            table[layer.path] = Node(f"{block}.add", block)
        else:
            call = int(part[-1]) - 1 if layer.kind == "relu" and "blocks" in layer.path else 0
            name = names[layer.path]
            table[layer.path] = Node(f"{name}_{call}" if call else name, name, call)
    return table


def from_spec(spec: ResNetV2Spec, *, weights: Given | None = None, zero_init_residual: bool = False) -> ResNetV2:
    """The model of any valid spec, with `weights` if there are any: a reference to a checkpoint of any known format, a
    checkpoint that was read, or arrays by canonical name.

    Raises `WeightsError` if they are not there, damaged, or of another spec.
    """
    model = ResNetV2(spec, zero_init_residual)
    if weights is not None:
        load_weights(model, weights_for(spec, weights))
    return model


def builder(name: str) -> Callable[..., ResNetV2]:
    """The public function that makes a named variant, with the keywords of torchvision's ResNet."""
    variant = VARIANTS[name]

    def build(
        *,
        weights: Given | None = None,
        progress: bool = True,
        num_classes: int = variant.classes,
        zero_init_residual: bool = False,
    ) -> ResNetV2:
        spec, weights = adopt(variant, weights, name, progress=progress)
        return from_spec(spec.replace(classes=num_classes), weights=weights, zero_init_residual=zero_init_residual)

    build.__doc__ = f"""{name}: stages of {", ".join(map(str, variant.blocks))} bottlenecks with pre-activation.

    The network is that of keras.applications, with logits; `weights` is the path of a checkpoint of any known format, a
    URL, or a name as "keras:imagenet" and "hf://timm/resnetv2_50.a1h_in1k", and the network takes its conventions.
    `progress` shows a download's, as a bar on standard error. Raises `SpecError` for values the network cannot have,
    `WeightsError` for weights that cannot be had or are another network's.
    """
    return build
