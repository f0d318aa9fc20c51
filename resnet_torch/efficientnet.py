"""EfficientNet in PyTorch, under torchvision's names: its checkpoints load with ``strict=True``, its features hold.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019 (arXiv:1905.11946).
Images are (N, channels, H, W).
"""

from collections.abc import Callable
from functools import partial
from math import sqrt

import torch
from torch import Tensor, nn

from common.architectures.efficientnet import VARIANTS, Block, EfficientNetSpec
from common.checkpoints import Given, adopt, weights_for
from common.names.efficientnet import TORCHVISION
from resnet_torch.layers import (
    ACTIVATIONS,
    Affine,
    Node,
    NormLayer,
    SqueezeExcitation,
    StochasticDepth,
    batch_norm2d,
    conv2d,
)
from resnet_torch.weights import load_weights


class ConvNormActivation(nn.Sequential):
    """A convolution without bias, its norm, and `activation` behind them, if any."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        spec: EfficientNetSpec,
        norm_layer: NormLayer,
        activation: Callable[[], nn.Module] | None,
        groups: int = 1,
    ) -> None:
        conv = conv2d(in_channels, out_channels, kernel, stride, padding=spec.padding, groups=groups, bias=False)
        super().__init__(conv, norm_layer(out_channels), *([] if activation is None else [activation()]))


class MBConv(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection: wide inside, narrow outside."""

    def __init__(self, block: Block, spec: EfficientNetSpec, norm_layer: NormLayer) -> None:
        super().__init__()
        layer = partial(ConvNormActivation, spec=spec, norm_layer=norm_layer)
        activation = ACTIVATIONS[spec.activation]
        self.block = nn.Sequential()
        if block.expanded != block.in_channels:
            self.block.append(layer(block.in_channels, block.expanded, activation=activation))
        depthwise = partial(layer, block.expanded, block.expanded, block.kernel, block.stride)
        self.block.append(depthwise(groups=block.expanded, activation=activation))
        if block.squeezed:
            gate = SqueezeExcitation(block.expanded, block.squeezed, spec.activation, spec.gate_activation)
            self.block.append(gate)
        # Nothing bends behind the projection: what is narrow would lose too much.
        self.block.append(layer(block.expanded, block.out_channels, activation=None))
        self.stochastic_depth = StochasticDepth(block.drop) if block.drop else nn.Identity()
        self.use_res_connect = block.residual

    def forward(self, input: Tensor) -> Tensor:
        result = self.block(input)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += input
        return result


class EfficientNet(nn.Module):
    """The network of `spec`: `features` (stem, stages, last convolution), `avgpool`, `classifier`.

    `norm_layer` makes a norm from a number of channels, in place of the spec's own batch norm. Initialised as by
    torchvision: convolutions Kaiming-normal over fan_out, a depthwise one's of all channels; norms one and zero; the
    dense layer uniform in ±1 / sqrt(classes); biases zero.
    """

    def __init__(self, spec: EfficientNetSpec, norm_layer: NormLayer | None = None) -> None:
        super().__init__()
        self.spec = spec
        norm_layer = norm_layer or _norm_layer(spec)
        activation = ACTIVATIONS[spec.activation]
        layer = partial(ConvNormActivation, spec=spec, norm_layer=norm_layer, activation=activation)
        affine = spec.layers[0]
        self.normalize = Affine(affine.scale, affine.shift) if affine.kind == "affine" else nn.Identity()  # type: ignore[attr-defined]
        self.features = nn.Sequential(layer(spec.in_channels, spec.stem_width, 3, 2))
        for blocks in spec.stages:
            self.features.append(nn.Sequential(*(MBConv(block, spec, norm_layer) for block in blocks)))
        self.features.append(layer(spec.widths[-1], spec.head_width))
        pools = {"average": nn.AdaptiveAvgPool2d, "max": nn.AdaptiveMaxPool2d}
        self.avgpool = pools[spec.head_pool](1) if spec.head_pool in pools else nn.Identity()
        self.flattens = spec.head_pool != "none"
        self.classifier = nn.Sequential()
        if spec.head != "none":
            # A dropout at rate 0 too, since the modules are numbered.
            self.classifier.extend([nn.Dropout(spec.dropout), nn.Linear(spec.head_width, spec.classes)])
        self.softmax = nn.Softmax(dim=1) if spec.head == "softmax" else None
        self.levels = [s + 1 for s in spec.levels]
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                bound = 1 / sqrt(module.out_features)
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(self.normalize(x)))
        if self.flattens:
            x = torch.flatten(x, 1)
        x = self.classifier(x)
        return x if self.softmax is None else self.softmax(x)

    @torch.jit.export
    def stages(self, x: Tensor) -> list[Tensor]:
        """The last stage's output at each resolution, (N, channels, H, W) each, at strides of 2, 4, 8, …"""
        outputs: list[Tensor] = []
        x = self.normalize(x)
        for index, module in enumerate(self.features):
            x = module(x)
            if index in self.levels:
                outputs.append(x)
        return outputs


def _norm_layer(spec: EfficientNetSpec) -> NormLayer:
    if not spec.norm:
        return lambda channels: nn.Identity()
    return batch_norm2d(eps=spec.bn_eps, momentum=spec.bn_momentum, running_variance=spec.running_variance)


def nodes(spec: EfficientNetSpec) -> dict[str, Node]:
    """Canonical path of every layer of the walk -> its node; `Node.module` names the module that holds its arrays."""
    # Products and sums are no modules, and the last that one does.
    own = ("gate", "add")
    return {
        path: Node(name, name.rpartition(".")[0] if path.rpartition(".")[2] in own else name)
        for path, name in TORCHVISION.layers(spec).items()
    }


def from_spec(
    spec: EfficientNetSpec, *, weights: Given | None = None, norm_layer: NormLayer | None = None
) -> EfficientNet:
    """The model of any valid spec, with the weights of a checkpoint of any known format if `weights` names one.

    Raises `WeightsError` if that file is not there, is damaged, or holds the weights of another spec.
    """
    model = EfficientNet(spec, norm_layer)
    if weights is not None:
        load_weights(model, weights_for(spec, weights))
    return model


def builder(name: str) -> Callable[..., EfficientNet]:
    """The public function that makes a named variant, with the keywords of torchvision."""
    variant = VARIANTS[name]

    def build(
        *,
        weights: Given | None = None,
        progress: bool = True,
        stochastic_depth_prob: float = variant.stochastic_depth,
        num_classes: int = variant.classes,
        norm_layer: NormLayer | None = None,
        dropout: float = variant.dropout,
    ) -> EfficientNet:
        spec, weights = adopt(variant, weights, name, progress=progress)
        spec = spec.replace(classes=num_classes, dropout=dropout, stochastic_depth=stochastic_depth_prob)
        return from_spec(spec, weights=weights, norm_layer=norm_layer)

    build.__doc__ = f"""{name}: stages of {", ".join(map(str, variant.repeats))} blocks, {variant.widths[-1]} channels.

    The keywords are torchvision's. `weights` is the path of a checkpoint of any known format, a URL, or a name as
    "torchvision:IMAGENET1K_V1" and "keras:imagenet"; the network takes its conventions. `progress` shows a download's,
    as a bar on standard error. Raises `SpecError` for values the network cannot have, `WeightsError` for weights that
    cannot be had or are another network's.
    """
    return build
