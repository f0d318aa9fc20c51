"""LeNet-5 in PyTorch, under the names that its many ports share: ``conv1``, ``conv2``, ``fc1``, ``fc2``, ``fc3``.

LeCun et al., "Gradient-based learning applied to document recognition", 1998. Images are (N, channels, H, W).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.architectures.layers import Dense, Padding
from common.architectures.lenet import VARIANTS, LeNetSpec
from common.checkpoints import Given, adopt, weights_for
from common.names.lenet import PYTORCH_NAMES
from resnet_torch.layers import ACTIVATIONS, Node, avg_pool2d, conv2d, max_pool2d
from resnet_torch.weights import load_weights


class LeNet(nn.Sequential):
    """The network of `spec`, its layers by name; initialised as PyTorch's layers are by default."""

    def __init__(self, spec: LeNetSpec) -> None:
        super().__init__()
        self.spec = spec
        channels = spec.in_channels
        for i, width in enumerate(spec.widths, start=1):
            padding: Padding | int = spec.padding if i == 1 else "valid"
            self.add_module(f"conv{i}", conv2d(channels, width, 5, padding=padding, bias=True))
            if spec.conv_activation != "none":
                self.add_module(f"{spec.conv_activation}{i}", ACTIVATIONS[spec.conv_activation]())
            if spec.pool == "average":
                pool = avg_pool2d(2, 2, padding=spec.pool_padding, count_padding=False)
            else:
                pool = max_pool2d(2, 2, padding=spec.pool_padding)
            self.add_module(f"pool{i}", pool)
            channels = width

        if spec.head_pool in ("average", "max"):
            self.pool = nn.AdaptiveAvgPool2d(1) if spec.head_pool == "average" else nn.AdaptiveMaxPool2d(1)
        if spec.head_pool != "none":
            self.flatten = nn.Flatten()
        dense = [layer for layer in spec.layers if isinstance(layer, Dense)]
        for i, layer in enumerate(dense, start=1):
            self.add_module(f"fc{i}", nn.Linear(layer.in_features, layer.out_features))
            if i < len(dense) and spec.dense_activation != "none":
                name = f"{spec.dense_activation}{len(spec.widths) + i}"
                self.add_module(name, ACTIVATIONS[spec.dense_activation]())
        if spec.head == "softmax":
            self.softmax = nn.Softmax(dim=1)

    @torch.jit.export
    def stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of both pools, (N, channels, H, W) each, at strides of 2 and 4."""
        outputs: list[Tensor] = []
        for name, module in self.named_children():
            if len(outputs) < 2:
                x = module(x)
            if name.startswith("pool") and name != "pool":
                outputs.append(x)
        return outputs


def nodes(spec: LeNetSpec) -> dict[str, Node]:
    """Canonical path of every layer of the walk -> its node; `Node.module` names the module that holds its arrays."""
    table = {path: Node(name, name) for path, name in PYTORCH_NAMES.layers(spec).items()}
    # What is flattened, while its axes are there to be put in canonical order.
    return table | {layer.path: Node("flatten", "pool2") for layer in spec.layers if layer.kind == "flatten"}


def from_spec(spec: LeNetSpec, *, weights: Given | None = None) -> LeNet:
    """The model of any valid spec, with the weights of a checkpoint of any known format if `weights` names one.

    Raises `WeightsError` if that file is not there, is damaged, or holds the weights of another spec.
    """
    model = LeNet(spec)
    if weights is not None:
        load_weights(model, weights_for(spec, weights))
    return model


def builder(name: str) -> Callable[..., LeNet]:
    """The public function that makes a named variant, with such keywords as torchvision's have."""
    variant = VARIANTS[name]

    def build(*, weights: Given | None = None, progress: bool = True, num_classes: int = variant.classes) -> LeNet:
        spec, weights = adopt(variant, weights, name, progress=progress)
        return from_spec(spec.replace(classes=num_classes), weights=weights)

    height, width = variant.default_size
    build.__doc__ = f"""{name}: two convolutions and three dense layers, for grey images of {height}x{width} pixels.

    `weights` is the path of a checkpoint of any known format, or a URL; the network takes its conventions. `progress`
    shows a download's, as a bar on standard error. Raises `SpecError` for values the network cannot have,
    `WeightsError` for weights that cannot be had or are another network's.
    """
    return build
