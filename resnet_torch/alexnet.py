"""AlexNet in PyTorch, under torchvision's names: its checkpoints load with ``strict=True``, its feature names hold.

Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014 (arXiv:1404.5997), and Krizhevsky
et al. 2012. Images are (N, channels, H, W).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.architectures.alexnet import GROUPED, KERNELS, NORMED, POOLED, VARIANTS, AlexNetSpec
from common.architectures.layers import Dense
from common.checkpoints import Given, adopt, weights_for
from common.names.alexnet import TORCHVISION
from resnet_torch.layers import Node, conv2d, local_response_norm, max_pool2d
from resnet_torch.weights import load_weights


class AlexNet(nn.Module):
    """The network of `spec`: `features`, `avgpool`, `classifier`; initialised as PyTorch's layers are by default."""

    def __init__(self, spec: AlexNetSpec) -> None:
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

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        if self.flattens:
            x = torch.flatten(x, 1)
        x = self.classifier(x)
        return x if self.softmax is None else self.softmax(x)

    @torch.jit.export
    def stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of the pools, (N, channels, H, W) each, at strides of 8, 16 and 32."""
        outputs: list[Tensor] = []
        for module in self.features:
            x = module(x)
            if isinstance(module, nn.MaxPool2d):
                outputs.append(x)
        return outputs


def _features(spec: AlexNetSpec) -> nn.Sequential:
    # PyTorch's alpha is Caffe's, divided by the size of the window; the spec's is the paper's, which is not.
    norm = {"alpha": spec.lrn_alpha, "beta": spec.lrn_beta, "k": spec.lrn_k}
    features = nn.Sequential()
    channels = spec.in_channels
    for i, (width, kernel) in enumerate(zip(spec.widths, KERNELS, strict=True), start=1):
        stride, padding = (4, spec.padding) if i == 1 else (1, kernel // 2)
        groups = spec.groups if i in GROUPED else 1
        features.append(conv2d(channels, width, kernel, stride, padding=padding, groups=groups, bias=True))
        features.append(nn.ReLU(inplace=True))
        channels = width
        if i in NORMED and spec.lrn == "before_pool":
            features.append(local_response_norm(spec.lrn_size, **norm))
        if i in POOLED:
            side = spec.last_pool if i == POOLED[-1] else 3
            features.append(max_pool2d(side, 2, padding=spec.pool_padding))
        if i in NORMED and spec.lrn == "behind_pool":
            features.append(local_response_norm(spec.lrn_size, **norm))
    return features


def _classifier(spec: AlexNetSpec) -> nn.Sequential:
    """Dense layers, each but the last with a dropout before it, or behind its activation."""
    classifier = nn.Sequential()
    dense = [layer for layer in spec.layers if isinstance(layer, Dense)]
    for layer, rate in zip(dense, (*spec.dropout, None), strict=False):
        linear = nn.Linear(layer.in_features, layer.out_features)
        if rate is None:
            classifier.append(linear)
            continue
        activation = nn.ReLU(inplace=True) if spec.dense_activation == "relu" else nn.Identity()
        # One at rate 0 too, since the modules are numbered.
        dropout = nn.Dropout(rate)
        hidden = (linear, activation)
        classifier.extend((dropout, *hidden) if spec.dropout_place == "before" else (*hidden, dropout))
    return classifier


def nodes(spec: AlexNetSpec) -> dict[str, Node]:
    """Canonical path of every layer of the walk -> its node; `Node.module` names the module that holds its arrays."""
    table = {path: Node(name, name) for path, name in TORCHVISION.layers(spec).items()}
    for layer in spec.layers:
        if layer.kind == "flatten":
            # What is flattened, while its axes are there to be put in canonical order.
            table[layer.path] = Node("flatten", "avgpool")
        elif layer.kind == "dropout" and layer.inputs == ("head.flatten",):
            first = next(other for other in spec.layers if isinstance(other, Dense))
            table[layer.path] = table[layer.path]._replace(flattened=first.flattened)
    return table


def from_spec(spec: AlexNetSpec, *, weights: Given | None = None) -> AlexNet:
    """The model of any valid spec, with the weights of a checkpoint of any known format if `weights` names one.

    Raises `WeightsError` if that file is not there, is damaged, or holds the weights of another spec.
    """
    model = AlexNet(spec)
    if weights is not None:
        load_weights(model, weights_for(spec, weights))
    return model


def builder(name: str) -> Callable[..., AlexNet]:
    """The public function that makes a named variant, with the keywords of torchvision."""
    variant = VARIANTS[name]

    def build(
        *,
        weights: Given | None = None,
        progress: bool = True,
        num_classes: int = variant.classes,
        dropout: float = 0.5,
    ) -> AlexNet:
        spec, weights = adopt(variant, weights, name, progress=progress)
        spec = spec.replace(classes=num_classes, dropout=(dropout,) * len(spec.hidden))
        return from_spec(spec, weights=weights)

    build.__doc__ = f"""{name}: five convolutions and three dense layers.

    The keywords are torchvision's. `weights` is the path of a checkpoint of any known format, a URL, or a name as
    "torchvision:IMAGENET1K_V1"; the network takes its conventions. `progress` shows a download's, as a bar on standard
    error. Raises `SpecError` for values the network cannot have, `WeightsError` for weights that cannot be had or are
    another network's.
    """
    return build
