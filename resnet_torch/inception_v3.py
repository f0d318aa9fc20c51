"""Inception v3 in PyTorch, under torchvision's names: its checkpoints load with ``strict=True``.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015 (arXiv:1512.00567). Images: NCHW.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.architectures.inception_v3 import VARIANTS, InceptionV3Spec, Pool
from common.architectures.layers import TRANSFORM_SCALE, TRANSFORM_SHIFT, Padding
from common.checkpoints import Given, adopt, weights_for
from common.names.inception_v3 import TORCHVISION
from resnet_torch.layers import Affine, Node, avg_pool2d, batch_norm2d, conv2d, max_pool2d
from resnet_torch.weights import load_weights

Kernel = int | tuple[int, int]


class InceptionOutputs(NamedTuple):
    """Logits, (N, classes) each: the network's own, and those of its auxiliary branch."""

    logits: Tensor
    aux_logits: Tensor


class BasicConv2d(nn.Sequential):
    """A convolution, a norm and a ReLU; padded where it does not stride. Kernels are (height, width)."""

    def __init__(
        self, spec: InceptionV3Spec, channels: int, width: int, kernel: Kernel = 1, stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        padding: Padding = "symmetric" if padded and stride == 1 else "valid"
        self.conv = conv2d(channels, width, kernel, stride, padding=padding, bias=not spec.norm)
        self.bn = batch_norm2d(**spec.norm_options)(width) if spec.norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)


class Concat(nn.Module):
    """The channels of all branches; a module, so that it can be observed."""

    def forward(self, branches: list[Tensor]) -> Tensor:
        return torch.cat(branches, 1)


def _pool(spec: InceptionV3Spec, op: Pool) -> nn.Module:
    # torchvision's average counts the zeros at the borders, that of the network it was ported from does not.
    average = avg_pool2d(3, 1, padding="symmetric", count_padding=spec.count_padding)
    return average if op == "average" else max_pool2d(3, 1, padding="symmetric")


class InceptionA(nn.Module):
    """1x1, 5x5, two 3x3 and a pool, side by side."""

    def __init__(self, spec: InceptionV3Spec, channels: int, pool_features: int) -> None:
        super().__init__()
        c = spec.width
        self.branch1x1 = BasicConv2d(spec, channels, c(64))
        self.branch5x5_1 = BasicConv2d(spec, channels, c(48))
        self.branch5x5_2 = BasicConv2d(spec, c(48), c(64), 5)
        self.branch3x3dbl_1 = BasicConv2d(spec, channels, c(64))
        self.branch3x3dbl_2 = BasicConv2d(spec, c(64), c(96), 3)
        self.branch3x3dbl_3 = BasicConv2d(spec, c(96), c(96), 3)
        self.avg_pool2d = _pool(spec, spec.branch_pool)
        self.branch_pool = BasicConv2d(spec, channels, pool_features)
        self.cat = Concat()

    def forward(self, x: Tensor) -> Tensor:
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return self.cat([self.branch1x1(x), branch5x5, branch3x3dbl, self.branch_pool(self.avg_pool2d(x))])


class InceptionB(nn.Module):
    """Halves the map: 3x3, two 3x3 and a pool."""

    def __init__(self, spec: InceptionV3Spec, channels: int) -> None:
        super().__init__()
        c = spec.width
        self.branch3x3 = BasicConv2d(spec, channels, c(384), 3, 2)
        self.branch3x3dbl_1 = BasicConv2d(spec, channels, c(64))
        self.branch3x3dbl_2 = BasicConv2d(spec, c(64), c(96), 3)
        self.branch3x3dbl_3 = BasicConv2d(spec, c(96), c(96), 3, 2)
        self.max_pool2d = max_pool2d(3, 2, padding="valid")
        self.cat = Concat()

    def forward(self, x: Tensor) -> Tensor:
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return self.cat([self.branch3x3(x), branch3x3dbl, self.max_pool2d(x)])


class InceptionC(nn.Module):
    """1x1, 7x7 and two 7x7 as rows and columns, and a pool; kernels are (height, width)."""

    def __init__(self, spec: InceptionV3Spec, channels: int, channels_7x7: int) -> None:
        super().__init__()
        width, c7 = spec.width(192), channels_7x7
        self.branch1x1 = BasicConv2d(spec, channels, width)
        self.branch7x7_1 = BasicConv2d(spec, channels, c7)
        self.branch7x7_2 = BasicConv2d(spec, c7, c7, (1, 7))
        self.branch7x7_3 = BasicConv2d(spec, c7, width, (7, 1))
        self.branch7x7dbl_1 = BasicConv2d(spec, channels, c7)
        self.branch7x7dbl_2 = BasicConv2d(spec, c7, c7, (7, 1))
        self.branch7x7dbl_3 = BasicConv2d(spec, c7, c7, (1, 7))
        self.branch7x7dbl_4 = BasicConv2d(spec, c7, c7, (7, 1))
        self.branch7x7dbl_5 = BasicConv2d(spec, c7, width, (1, 7))
        self.avg_pool2d = _pool(spec, spec.branch_pool)
        self.branch_pool = BasicConv2d(spec, channels, width)
        self.cat = Concat()

    def forward(self, x: Tensor) -> Tensor:
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        return self.cat([self.branch1x1(x), branch7x7, branch7x7dbl, self.branch_pool(self.avg_pool2d(x))])


class InceptionD(nn.Module):
    """Halves the map: 3x3, 7x7 with 3x3 and a pool."""

    def __init__(self, spec: InceptionV3Spec, channels: int) -> None:
        super().__init__()
        c = spec.width
        self.branch3x3_1 = BasicConv2d(spec, channels, c(192))
        self.branch3x3_2 = BasicConv2d(spec, c(192), c(320), 3, 2)
        self.branch7x7x3_1 = BasicConv2d(spec, channels, c(192))
        self.branch7x7x3_2 = BasicConv2d(spec, c(192), c(192), (1, 7))
        self.branch7x7x3_3 = BasicConv2d(spec, c(192), c(192), (7, 1))
        self.branch7x7x3_4 = BasicConv2d(spec, c(192), c(192), 3, 2)
        self.max_pool2d = max_pool2d(3, 2, padding="valid")
        self.cat = Concat()

    def forward(self, x: Tensor) -> Tensor:
        branch7x7x3 = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return self.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(branch7x7x3), self.max_pool2d(x)])


class InceptionE(nn.Module):
    """1x1, 3x3 and two 3x3 that end in a row beside a column, and a pool."""

    def __init__(self, spec: InceptionV3Spec, channels: int, pool: Pool) -> None:
        super().__init__()
        c = spec.width
        self.branch1x1 = BasicConv2d(spec, channels, c(320))
        self.branch3x3_1 = BasicConv2d(spec, channels, c(384))
        self.branch3x3_2a = BasicConv2d(spec, c(384), c(384), (1, 3))
        self.branch3x3_2b = BasicConv2d(spec, c(384), c(384), (3, 1))
        self.branch3x3dbl_1 = BasicConv2d(spec, channels, c(448))
        self.branch3x3dbl_2 = BasicConv2d(spec, c(448), c(384), 3)
        self.branch3x3dbl_3a = BasicConv2d(spec, c(384), c(384), (1, 3))
        self.branch3x3dbl_3b = BasicConv2d(spec, c(384), c(384), (3, 1))
        self.avg_pool2d = _pool(spec, pool)
        self.branch_pool = BasicConv2d(spec, channels, c(192))
        self.cat = Concat()

    def forward(self, x: Tensor) -> Tensor:
        branch3x3 = self.branch3x3_1(x)
        branch3x3 = self.cat([self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)])
        branch3x3dbl = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3dbl = self.cat([self.branch3x3dbl_3a(branch3x3dbl), self.branch3x3dbl_3b(branch3x3dbl)])
        return self.cat([self.branch1x1(x), branch3x3, branch3x3dbl, self.branch_pool(self.avg_pool2d(x))])


class InceptionAux(nn.Sequential):
    """Logits of the last map at a stride of 16, of 17x17 at least."""

    def __init__(self, spec: InceptionV3Spec, channels: int) -> None:
        super().__init__()
        c = spec.width
        self.avg_pool2d = avg_pool2d(5, 3, padding="valid", count_padding=spec.count_padding)
        self.conv0 = BasicConv2d(spec, channels, c(128))
        self.conv1 = BasicConv2d(spec, c(128), c(768), 5, padded=False)
        self.adaptive_avg_pool2d = nn.AdaptiveAvgPool2d((1, 1))
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(c(768), spec.classes)


class InceptionV3(nn.Module):
    """The network of `spec`. In training mode it returns `InceptionOutputs` where it has auxiliary logits.

    With `init_weights` initialised as torchvision does: kernels normal with a deviation of 0.1, of the auxiliary
    classifier 0.001, norms one and zero; otherwise, and biases in any case, as PyTorch's layers are by default.
    """

    def __init__(self, spec: InceptionV3Spec, init_weights: bool = True) -> None:
        super().__init__()
        self.spec, c = spec, spec.width
        self.transform = Affine(TRANSFORM_SCALE, TRANSFORM_SHIFT) if spec.transform_input else nn.Identity()
        self.Conv2d_1a_3x3 = BasicConv2d(spec, spec.in_channels, c(32), 3, 2)
        self.Conv2d_2a_3x3 = BasicConv2d(spec, c(32), c(32), 3, padded=False)
        self.Conv2d_2b_3x3 = BasicConv2d(spec, c(32), c(64), 3)
        self.maxpool1 = max_pool2d(3, 2, padding="valid")
        self.Conv2d_3b_1x1 = BasicConv2d(spec, c(64), c(80))
        self.Conv2d_4a_3x3 = BasicConv2d(spec, c(80), c(192), 3, padded=False)
        self.maxpool2 = max_pool2d(3, 2, padding="valid")
        for name, block in _blocks(spec):
            if name == "Mixed_7a":
                self.AuxLogits = InceptionAux(spec, c(768)) if spec.aux else None
            self.add_module(name, block)
        self.aux_in_eval = spec.aux_in_eval
        vector = spec.head_pool != "none"
        pool = nn.AdaptiveMaxPool2d if spec.head_pool == "max" else nn.AdaptiveAvgPool2d
        self.avgpool = pool((1, 1)) if vector else nn.Identity()
        self.flatten = nn.Flatten() if vector else nn.Identity()
        self.dropout = nn.Identity() if spec.head == "none" else nn.Dropout(spec.dropout)
        self.fc = nn.Identity() if spec.head == "none" else nn.Linear(c(2048), spec.classes)
        self.softmax = nn.Softmax(dim=1) if spec.head == "softmax" else nn.Identity()
        for name, module in self.named_modules() if init_weights else ():
            if isinstance(module, nn.Conv2d | nn.Linear):
                # The bounds are no multiples of the deviation: nothing is cut off.
                nn.init.trunc_normal_(module.weight, std=0.001 if name == "AuxLogits.fc" else 0.1, a=-2, b=2)

    def forward(self, x: Tensor) -> Tensor | InceptionOutputs:
        maps = self.stages(x)
        x = self.softmax(self.fc(self.dropout(self.flatten(self.avgpool(maps[-1])))))
        if self.AuxLogits is not None:  # noqa: SIM102  so that TorchScript leaves out what there is not
            if self.training or self.aux_in_eval:
                return InceptionOutputs(x, self.AuxLogits(maps[-2]))
        return x

    @torch.jit.export
    def stages(self, x: Tensor) -> list[Tensor]:
        """The last map at each resolution, (N, channels, H, W) each, at strides of 2, 4, 8, 16 and 32."""
        outputs: list[Tensor] = []
        for name, module in self.named_children():
            if name in ("maxpool1", "maxpool2", "Mixed_6a", "Mixed_7a"):
                outputs.append(x)
            if name[:5] in ("trans", "Conv2", "maxpo", "Mixed"):
                x = module(x)
        outputs.append(x)
        return outputs


def _blocks(spec: InceptionV3Spec) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name."""
    c, channels, letters = spec.width, spec.width(192), "bcdefghijklmnopqrstuvwxyz"
    for letter, features in zip(letters, spec.pool_features, strict=False):
        yield f"Mixed_5{letter}", InceptionA(spec, channels, features)
        channels = c(224) + features
    yield "Mixed_6a", InceptionB(spec, channels)
    channels += c(480)
    for letter, inner in zip(letters, spec.channels_7x7, strict=False):
        yield f"Mixed_6{letter}", InceptionC(spec, channels, inner)
        channels = c(768)
    yield "Mixed_7a", InceptionD(spec, channels)
    channels += c(512)
    for letter, pool in zip(letters, spec.wide_pools, strict=False):
        yield f"Mixed_7{letter}", InceptionE(spec, channels, pool)
        channels = c(2048)


def nodes(spec: InceptionV3Spec) -> dict[str, Node]:
    """Canonical path of every layer of the walk -> its node; `Node.module` names the module that holds its arrays."""
    names = {path: name.partition(".cat_") for path, name in TORCHVISION.layers(spec).items()}  # a module's calls
    return {path: Node("".join(n), f"{n[0]}.cat" if n[2] else n[0], int(n[2] or 0)) for path, n in names.items()}


def from_spec(spec: InceptionV3Spec, *, weights: Given | None = None, init_weights: bool = True) -> InceptionV3:
    """The model of any valid spec, with the weights of a checkpoint of any known format if `weights` names one.

    Raises `WeightsError` if that file is not there, is damaged, or holds the weights of another spec.
    """
    model = InceptionV3(spec, init_weights and weights is None)
    if weights is not None:
        load_weights(model, weights_for(spec, weights))
    return model


def builder(name: str) -> Callable[..., InceptionV3]:
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
        init_weights: bool = True,
    ) -> InceptionV3:
        spec, weights = adopt(variant, weights, name, progress=progress)
        asked = {"aux": aux_logits, "transform_input": transform_input}
        spec = spec.replace(classes=num_classes, dropout=dropout)
        spec = spec.replace(**{name: value for name, value in asked.items() if value is not None})
        return from_spec(spec, weights=weights, init_weights=init_weights)

    build.__doc__ = f"""{name}: for images of 299x299; at least 75x75, with auxiliary logits 299x299 in training.

    The keywords are torchvision's. `weights` is the path of a checkpoint of any known format, a URL, or a name as
    "torchvision:IMAGENET1K_V1" and "keras:imagenet"; the network takes its conventions and, unless these are given, its
    `transform_input`, true of torchvision's published weights, and `aux_logits`. `progress` shows a download's. Raises
    `SpecError` for values the network cannot have, `WeightsError` for weights that cannot be had or are another's.
    """
    return build
