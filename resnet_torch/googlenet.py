"""GoogLeNet in PyTorch, under torchvision's names: its checkpoints load with ``strict=True``, its feature names hold.

Szegedy et al., "Going Deeper with Convolutions", 2014 (arXiv:1409.4842). Images are (N, channels, H, W).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.architectures.googlenet import VARIANTS, GoogLeNetSpec, Module
from common.architectures.layers import TRANSFORM_SCALE, TRANSFORM_SHIFT
from common.checkpoints import Given, adopt, weights_for
from common.names.googlenet import TORCHVISION
from resnet_torch.layers import Affine, Node, avg_pool2d, batch_norm2d, conv2d, local_response_norm, max_pool2d
from resnet_torch.weights import load_weights


class GoogLeNetOutputs(NamedTuple):
    """What a network with auxiliary heads returns in training: the logits, and those of its heads, the last first."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class BasicConv2d(nn.Module):
    """A convolution, its norm, if any, and a ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, *, spec: GoogLeNetSpec
    ) -> None:
        super().__init__()
        padding = spec.stem_padding if stride > 1 else "symmetric"
        self.conv = conv2d(in_channels, out_channels, kernel, stride, padding=padding, bias=not spec.norm)
        self.bn: nn.Module = nn.Identity()
        if spec.norm:
            norm_layer = batch_norm2d(
                eps=spec.bn_eps,
                momentum=spec.bn_momentum,
                running_variance=spec.running_variance,
                scale=spec.bn_scale,
            )
            self.bn = norm_layer(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Four branches of one input: 1x1, 3x3, 5x5 and a pool; their channels one after the other."""

    def __init__(self, module: Module, spec: GoogLeNetSpec) -> None:
        super().__init__()
        conv, channels = partial(BasicConv2d, spec=spec), module.in_channels
        self.branch1 = conv(channels, module.direct)
        self.branch2 = nn.Sequential(conv(channels, module.reduce3), conv(module.reduce3, module.wide3, 3))
        # torchvision's weights were made with windows of 3x3 here, and are of no use with the paper's 5x5.
        large = conv(module.reduce5, module.wide5, spec.large_kernel)
        self.branch3 = nn.Sequential(conv(channels, module.reduce5), large)
        self.branch4 = nn.Sequential(max_pool2d(3, 1, padding="symmetric"), conv(channels, module.projection))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class InceptionAux(nn.Module):
    """A classifier of a map in the middle, which helps gradients to reach what is before it."""

    def __init__(self, in_channels: int, spec: GoogLeNetSpec) -> None:
        super().__init__()
        (height, cells), (width, hidden) = spec.aux_map, spec.aux_widths
        window = avg_pool2d(5, 3, padding="valid", count_padding=False)
        self.pool = nn.AdaptiveAvgPool2d(spec.aux_map) if spec.aux_pool == "adaptive" else window
        self.conv = BasicConv2d(in_channels, width, spec=spec)
        self.fc1 = nn.Linear(height * cells * width, hidden)
        self.fc2 = nn.Linear(hidden, spec.classes)
        self.dropout = nn.Dropout(spec.aux_dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.conv(self.pool(x)), 1)
        x = F.relu(self.fc1(x), inplace=True)
        return self.fc2(self.dropout(x))


class GoogLeNet(nn.Module):
    """The network of `spec`: `conv1`, `maxpool1`, …, `inception3a`, …, `fc`, each of which reads what the one before
    gives, but for `aux1` and `aux2`, which read the modules in `tapped`.

    In training it returns `GoogLeNetOutputs` where it has auxiliary heads; otherwise, and in eval mode, the logits
    alone, or what the head of `spec` gives. With `init_weights` initialised as by torchvision: kernels normal with a
    deviation of 0.01, norms one and zero, biases as PyTorch's layers have them; otherwise all is as these have it.
    """

    def __init__(self, spec: GoogLeNetSpec, init_weights: bool = True) -> None:
        super().__init__()
        self.spec = spec
        for name, module in _modules(spec).items():
            self.add_module(name, module)
        self.tapped, self.heads = list(spec.auxiliary), list(spec.auxiliary.values())
        self.ends = [modules[-1].path for modules in spec.modules]
        if init_weights:
            self._initialise()

    def _initialise(self) -> None:
        # torchvision cuts the normal distribution off at -2 and 2, which are 200 deviations.
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        middle: list[Tensor] = []
        auxiliary: list[Tensor] = []
        for name, module in self.named_children():
            if name not in self.heads:
                x = module(x)
                if self.training and name in self.tapped:
                    middle.append(x)
            elif self.training:
                auxiliary.append(module(middle[len(auxiliary)]))
        if len(auxiliary) == 0:
            return x
        return GoogLeNetOutputs(x, auxiliary[1], auxiliary[0])

    @torch.jit.export
    def stages(self, x: Tensor) -> list[Tensor]:
        """The outputs of the stages of Inception modules, (N, channels, H, W) each, at strides of 8, 16 and 32."""
        outputs: list[Tensor] = []
        for name, module in self.named_children():
            if name not in self.heads:
                x = module(x)
            if name in self.ends:
                outputs.append(x)
        return outputs


def _modules(spec: GoogLeNetSpec) -> dict[str, nn.Module]:
    conv, (first, second, third) = partial(BasicConv2d, spec=spec), spec.stem
    pool = partial(max_pool2d, stride=2, padding=spec.pool_padding)
    norm = partial(local_response_norm, spec.lrn_size, alpha=spec.lrn_alpha, beta=spec.lrn_beta, k=spec.lrn_k)
    modules: dict[str, nn.Module] = {}
    if spec.transform_input:
        modules["transform"] = Affine(TRANSFORM_SCALE, TRANSFORM_SHIFT)
    modules |= {"conv1": conv(spec.in_channels, first, 7, 2), "maxpool1": pool(3)}
    if spec.lrn:
        modules["norm1"] = norm()
    modules |= {"conv2": conv(first, second), "conv3": conv(second, third, 3)}
    if spec.lrn:
        modules["norm2"] = norm()
    modules["maxpool2"] = pool(3)
    for stage, side in zip(spec.modules, (3, spec.last_pool, None), strict=True):
        for module in stage:
            modules[module.path] = Inception(module, spec)
        if side is not None:
            modules[f"maxpool{module.stage}"] = pool(side)
    tapped = {m.path: m.out_channels for stage in spec.modules for m in stage}
    modules |= {aux: InceptionAux(tapped[path], spec) for path, aux in spec.auxiliary.items()}
    if spec.head_pool != "none":
        pools = {"average": nn.AdaptiveAvgPool2d, "max": nn.AdaptiveMaxPool2d}
        modules |= {"avgpool": pools[spec.head_pool](1), "flatten": nn.Flatten()}
    if spec.head != "none":
        modules |= {"dropout": nn.Dropout(spec.dropout), "fc": nn.Linear(module.out_channels, spec.classes)}
    if spec.head == "softmax":
        modules["softmax"] = nn.Softmax(dim=1)
    return modules


def nodes(spec: GoogLeNetSpec) -> dict[str, Node]:
    """Canonical path of every layer of the walk -> its node; `Node.module` names the module that holds its arrays."""
    table = {}
    for path, name in TORCHVISION.layers(spec).items():
        where, _, last = name.rpartition(".")
        table[path] = Node(name, name)
        if path.endswith(".concat"):
            table[path] = Node(f"{name}.cat", name)
        elif path.endswith("_relu"):
            table[path] = Node(name, where)  # what the convolution with all behind it gives
        elif path.endswith(".flatten"):
            # What is flattened, while its axes are there to be put in canonical order.
            table[path] = Node(name, f"{where}.conv")
        elif last == "relu":
            table[path] = Node(name, f"{where}.dropout", value="input")
    return table


def from_spec(spec: GoogLeNetSpec, *, weights: Given | None = None, init_weights: bool = True) -> GoogLeNet:
    """The model of any valid spec, with the weights of a checkpoint of any known format if `weights` names one.

    Raises `WeightsError` if that file is not there, is damaged, or holds the weights of another spec.
    """
    model = GoogLeNet(spec, init_weights and weights is None)
    if weights is not None:
        load_weights(model, weights_for(spec, weights))
    return model


def builder(name: str) -> Callable[..., GoogLeNet]:
    """The public function that makes a named variant, with the keywords of torchvision."""
    variant = VARIANTS[name]

    def build(
        *,
        weights: Given | None = None,
        progress: bool = True,
        aux_logits: bool | None = None,
        transform_input: bool | None = None,
        num_classes: int = variant.classes,
        dropout: float = variant.dropout,
        dropout_aux: float = variant.aux_dropout,
        init_weights: bool = True,
    ) -> GoogLeNet:
        aux = variant.aux and weights is None if aux_logits is None else aux_logits
        spec, weights = adopt(variant, weights, name, progress=progress)
        spec = spec.replace(aux=aux, classes=num_classes, dropout=dropout, aux_dropout=dropout_aux)
        if transform_input is not None:
            spec = spec.replace(transform_input=transform_input)
        return from_spec(spec, weights=weights, init_weights=init_weights)

    build.__doc__ = f"""{name}: {len(variant.widths)} Inception modules behind three convolutions.

    The keywords are torchvision's. Without `weights` it has auxiliary heads and takes images as they are, unless
    `aux_logits` and `transform_input` say something else; with weights the heads are left off, and it takes the
    conventions of these: of torchvision's, whose images have ImageNet's mean and deviation, back to -1 … 1. `weights`
    is the path of a checkpoint of any known format, a URL, or a name as "torchvision:IMAGENET1K_V1". `progress` shows a
    download's, as a bar on standard error. Raises `SpecError` for values the network cannot have, `WeightsError` for
    weights that cannot be had or are another network's.
    """
    return build
