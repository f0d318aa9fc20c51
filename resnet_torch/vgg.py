"""VGG in PyTorch, under torchvision's names: its checkpoints load with ``strict=True``, its feature names hold.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014 (arXiv:1409.1556).
Images are (N, channels, H, W).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.architectures.vgg import VARIANTS, VGGSpec
from common.checkpoints import Given, adopt, weights_for
from common.names.vgg import TORCHVISION
from resnet_torch.layers import Node, batch_norm2d, conv2d, max_pool2d
from resnet_torch.weights import load_weights


class VGG(nn.Module):
    """The network of `spec`: `features`, `avgpool`, `classifier`.

    With `init_weights` initialised as torchvision does: convolutions Kaiming-normal over fan_out, norms one and zero,
    dense layers normal with a deviation of 0.01, biases zero; otherwise as PyTorch's layers are by default.
    """

    def __init__(self, spec: VGGSpec, init_weights: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.features = _features(spec)
        pools = {
            "adaptive": (nn.AdaptiveAvgPool2d, spec.map_size),
            "adaptive_max": (nn.AdaptiveMaxPool2d, spec.map_size),
            "average": (nn.AdaptiveAvgPool2d, (1, 1)),
            "max": (nn.AdaptiveMaxPool2d, (1, 1)),
        }
        pool, size = pools.get(spec.head_pool, (nn.Identity, None))
        self.avgpool = pool(size)
        self.flattens = spec.head_pool != "none"
        self.classifier = _classifier(spec)
        self.softmax = nn.Softmax(dim=1) if spec.head == "softmax" else None
        if init_weights:
            self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # every convolution has one
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        if self.flattens:
            x = torch.flatten(x, 1)
        x = self.classifier(x)
        return x if self.softmax is None else self.softmax(x)

    @torch.jit.export
    def stages(self, x: Tensor) -> list[Tensor]:
        """Every block's output, (N, channels, H, W) each, at strides of 2, 4, 8, …"""
        outputs: list[Tensor] = []
        for module in self.features:
            x = module(x)
            if isinstance(module, nn.MaxPool2d):
                outputs.append(x)
        return outputs


def _features(spec: VGGSpec) -> nn.Sequential:
    norm_layer = batch_norm2d(eps=spec.bn_eps, momentum=spec.bn_momentum, running_variance=spec.running_variance)
    features = nn.Sequential()
    channels = spec.in_channels
    for count, width, pointwise in zip(spec.convs, spec.widths, spec.pointwise, strict=True):
        for i in range(count):
            kernel = 1 if pointwise and i == count - 1 else 3
            # The bias stays under a norm, where it does nothing: torchvision's files have it.
            features.append(conv2d(channels, width, kernel, padding="symmetric", bias=True))
            if spec.norm:
                features.append(norm_layer(width))
            features.append(nn.ReLU(inplace=True))
            channels = width
        features.append(max_pool2d(2, 2, padding="valid"))
    return features


def _classifier(spec: VGGSpec) -> nn.Sequential:
    """Dense layers with a ReLU and a dropout behind each but the last."""
    classifier = nn.Sequential()
    dense = [layer for layer in spec.layers if layer.kind == "dense"]
    for layer, rate in zip(dense, (*spec.dropout, None), strict=False):
        (features, width) = layer.parameters[f"{layer.path}.kernel"]
        classifier.append(nn.Linear(features, width))
        if rate is not None:
            classifier.append(nn.ReLU(inplace=True))
            # One at rate 0 too, since the modules are numbered.
            classifier.append(nn.Dropout(rate))
    return classifier


def nodes(spec: VGGSpec) -> dict[str, Node]:
    """Canonical path of every layer of the walk -> its node; `Node.module` names the module that holds its arrays."""
    table = {path: Node(name, name) for path, name in TORCHVISION.layers(spec).items()}
    # What is flattened, while its axes are there to be put in canonical order.
    return table | {layer.path: Node("flatten", "avgpool") for layer in spec.layers if layer.kind == "flatten"}


def from_spec(spec: VGGSpec, *, weights: Given | None = None, init_weights: bool = True) -> VGG:
    """The model of any valid spec, with the weights of a checkpoint of any known format if `weights` names one.

    Raises `WeightsError` if that file is not there, is damaged, or holds the weights of another spec.
    """
    model = VGG(spec, init_weights and weights is None)
    if weights is not None:
        load_weights(model, weights_for(spec, weights))
    return model


def builder(name: str) -> Callable[..., VGG]:
    """The public function that makes a named variant, with the keywords of torchvision."""
    variant = VARIANTS[name]

    def build(
        *,
        weights: Given | None = None,
        progress: bool = True,
        num_classes: int = variant.classes,
        init_weights: bool = True,
        dropout: float = 0.5,
    ) -> VGG:
        spec, weights = adopt(variant, weights, name, progress=progress)
        spec = spec.replace(classes=num_classes, dropout=(dropout,) * len(spec.hidden))
        return from_spec(spec, weights=weights, init_weights=init_weights)

    build.__doc__ = f"""{name}: blocks of {", ".join(map(str, variant.convs))} convolutions and three dense layers.

    The keywords are torchvision's. `weights` is the path of a checkpoint of any known format, a URL, or a name as
    "torchvision:IMAGENET1K_V1" and "keras:imagenet"; the network takes its conventions. `progress` shows a download's,
    as a bar on standard error. Raises `SpecError` for values the network cannot have, `WeightsError` for weights that
    cannot be had or are another network's.
    """
    return build
