"""DenseNet in PyTorch, under torchvision's names: its checkpoints load with ``strict=True``, its feature names hold.

Huang et al., "Densely Connected Convolutional Networks", 2016 (arXiv:1608.06993). Images are (N, channels, H, W).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.architectures.densenet import VARIANTS, DenseNetSpec
from common.checkpoints import Given, adopt, weights_for
from common.names.densenet import TORCHVISION
from resnet_torch.layers import Node, NormLayer, avg_pool2d, batch_norm2d, conv2d, max_pool2d
from resnet_torch.weights import load_weights


class DenseLayer(nn.Module):
    """Norm, ReLU and a 1x1 convolution, and the same with a 3x3 one."""

    def __init__(self, spec: DenseNetSpec, channels: int, norm_layer: NormLayer, memory_efficient: bool) -> None:
        super().__init__()
        self.memory_efficient = memory_efficient
        inner = spec.bottleneck * spec.growth_rate
        self.norm1 = norm_layer(channels)
        # In place of what a norm gave; without a norm, the features would be lost to the layers after this one.
        self.relu1 = nn.ReLU(inplace=spec.norm)
        self.conv1 = conv2d(channels, inner, 1, padding="valid", bias=spec.conv_bias)
        self.norm2 = norm_layer(inner)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv2d(inner, spec.growth_rate, 3, padding="symmetric", bias=spec.conv_bias)
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else None

    def forward(self, features: list[Tensor]) -> Tensor:
        """`growth_rate` channels, of the channels of all features."""
        frugal = self.memory_efficient and torch.is_grad_enabled()
        squeezed = self._recomputed(features) if frugal else self.squeezed(features)
        new = self.conv2(self.relu2(self.norm2(squeezed)))
        return new if self.dropout is None else self.dropout(new)

    def squeezed(self, features: list[Tensor]) -> Tensor:
        x = features[0] if len(features) == 1 else torch.cat(features, 1)
        return self.conv1(self.relu1(self.norm1(x)))

    @torch.jit.unused
    def _recomputed(self, features: list[Tensor]) -> Tensor:
        """The same; a backward pass computes it again, and training needs memory in proportion to the depth, not to its
        square (Pleiss et al. 2017, arXiv:1707.06990)."""
        return checkpoint(
            lambda *tensors: self.squeezed(list(tensors)),
            *features,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _set_aside(self.norm1)),
        )


@contextmanager
def _set_aside(norm: nn.Module) -> Iterator[None]:
    """The running statistics are not averaged a second time with the same batch, as torchvision's are."""
    buffers = dict(norm.named_buffers())
    for name, buffer in buffers.items():
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for name, buffer in buffers.items():
            setattr(norm, name, buffer)


class DenseBlock(nn.ModuleDict):
    """Dense layers, `denselayer1`, `denselayer2`, …, each of which reads what all before it gave."""

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """Norm, ReLU, a 1x1 convolution to fewer channels, and a pool that halves the map."""

    def __init__(self, spec: DenseNetSpec, channels: int, kept: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.norm = norm_layer(channels)
        self.relu = nn.ReLU(inplace=spec.norm)
        self.conv = conv2d(channels, kept, 1, padding=spec.transition_padding, bias=spec.conv_bias)
        average = avg_pool2d(2, 2, padding="valid", count_padding=True)
        self.pool = average if spec.transition_pool == "average" else max_pool2d(2, 2, padding="valid")


class DenseNet(nn.Module):
    """The network of `spec`: `features` up to the last norm, and `classifier`.

    With `memory_efficient` a backward pass computes again what each layer's first convolution reads. Initialised as
    torchvision does: convolutions Kaiming-normal over fan_in, norms one and zero, the dense layer uniform with a bias
    of zero.
    """

    def __init__(self, spec: DenseNetSpec, memory_efficient: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.features = _features(spec, memory_efficient)
        self.relu = nn.ReLU(inplace=spec.norm)
        pools = {"average": nn.AdaptiveAvgPool2d, "max": nn.AdaptiveMaxPool2d}
        self.avgpool = pools[spec.head_pool]((1, 1)) if spec.head_pool in pools else nn.Identity()
        self.flattens = spec.head_pool != "none"
        channels, _ = spec.widths[-1]
        self.classifier = nn.Identity() if spec.head == "none" else nn.Linear(channels, spec.classes)
        self.softmax = nn.Softmax(dim=1) if spec.head == "softmax" else None
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.relu(self.features(x)))
        if self.flattens:
            x = torch.flatten(x, 1)
        x = self.classifier(x)
        return x if self.softmax is None else self.softmax(x)

    @torch.jit.export
    def stages(self, x: Tensor) -> list[Tensor]:
        """Every block's output, (N, channels, H, W) each, at strides of 4, 8, 16, …"""
        outputs: list[Tensor] = []
        for name, module in self.features.named_children():
            x = module(x)
            if name.startswith("denseblock"):
                outputs.append(x)
        return outputs


def _features(spec: DenseNetSpec, memory_efficient: bool) -> nn.Sequential:
    norm_layer: NormLayer = lambda channels: nn.Identity()  # noqa: E731
    if spec.norm:
        norm_layer = batch_norm2d(eps=spec.bn_eps, momentum=spec.bn_momentum, running_variance=spec.running_variance)
    features = nn.Sequential()
    stem = conv2d(spec.in_channels, spec.stem_width, 7, 2, padding=spec.stem_padding, bias=False)
    features.add_module("conv0", stem)
    features.add_module("norm0", norm_layer(spec.stem_width))
    features.add_module("relu0", nn.ReLU(inplace=True))
    features.add_module("pool0", max_pool2d(3, 2, padding=spec.pool_padding))
    channels = spec.stem_width
    for b, (count, (width, kept)) in enumerate(zip(spec.blocks, spec.widths, strict=True), start=1):
        block = DenseBlock()
        for i in range(count):
            layer = DenseLayer(spec, channels + i * spec.growth_rate, norm_layer, memory_efficient)
            block.add_module(f"denselayer{i + 1}", layer)
        features.add_module(f"denseblock{b}", block)
        if b < len(spec.blocks):
            features.add_module(f"transition{b}", Transition(spec, width, kept, norm_layer))
        channels = kept
    features.add_module("norm5", norm_layer(spec.widths[-1][0]))  # the number is torchvision's at any depth
    return features


def nodes(spec: DenseNetSpec) -> dict[str, Node]:
    """Canonical path of every layer of the walk -> its node; `Node.module` names the module that holds its arrays."""
    table = {path: Node(name, name) for path, name in TORCHVISION.layers(spec).items()}
    for b, count in enumerate(spec.blocks):
        block = f"features.denseblock{b + 1}"
        for i in range(count - 1):
            following = f"{block}.denselayer{i + 2}"
            table[f"blocks.{b}.layers.{i}.concat"] = Node(f"{following}.cat", f"{following}.norm1", value="input")
        table[f"blocks.{b}.layers.{count - 1}.concat"] = Node(f"{block}.cat", block)
    return table


def from_spec(spec: DenseNetSpec, *, weights: Given | None = None, memory_efficient: bool = False) -> DenseNet:
    """The model of any valid spec, with the weights of a checkpoint of any known format if `weights` names one.

    `memory_efficient` is that of `DenseNet`. Raises `WeightsError` if that file is not there, is damaged, or holds
    the weights of another spec.
    """
    model = DenseNet(spec, memory_efficient)
    if weights is not None:
        load_weights(model, weights_for(spec, weights))
    return model


def builder(name: str) -> Callable[..., DenseNet]:
    """The public function that makes a named variant, with the keywords of torchvision."""
    variant = VARIANTS[name]

    def build(
        *,
        weights: Given | None = None,
        progress: bool = True,
        bn_size: int = variant.bottleneck,
        drop_rate: float = variant.dropout,
        num_classes: int = variant.classes,
        memory_efficient: bool = False,
    ) -> DenseNet:
        spec, weights = adopt(variant, weights, name, progress=progress)
        spec = spec.replace(bottleneck=bn_size, dropout=drop_rate, classes=num_classes)
        return from_spec(spec, weights=weights, memory_efficient=memory_efficient)

    build.__doc__ = f"""{name}: blocks of {", ".join(map(str, variant.blocks))} dense layers.

    The keywords are torchvision's: `bn_size` is the width between a layer's convolutions in growth rates, `drop_rate`
    that of the dropout behind the second, `memory_efficient` computes again in a backward pass what is cheap to
    compute. `weights` is the path of a checkpoint of any known format, a URL, or a name as
    "torchvision:IMAGENET1K_V1" and "keras:imagenet"; the network takes its conventions. `progress` shows a download's,
    as a bar on standard error. Raises `SpecError` for values the network cannot have, `WeightsError` for weights that
    cannot be had or are another network's.
    """
    return build
