"""The two namings of Keras' ResNets: keras.applications' today (``conv2_block1_1_conv``), and the classic one.

The classic names (``res2a_branch2a``, ``bn2a_branch2a``) are Caffe's and those of the first Keras ResNet-50; our own
Keras models carry them. Both number stages from 2, and both give a layer one name and its arrays another below it, so
that a native name is ``<layer>/<array>`` whatever the file makes of that. keras.applications has no basic blocks: the
same scheme is used for them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np

from common.architectures import Spec
from common.architectures.layers import Layer
from common.architectures.resnet import CONVENTIONS
from common.checkpoints.base import KernelLayout, Skeleton, skeleton_from
from common.checkpoints.containers import Stored
from common.errors import CheckpointError

ARRAYS = {
    "conv": {"kernel": "kernel", "bias": "bias"},
    "norm": {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"},
    "dense": {"kernel": "kernel", "bias": "bias"},
}
# What a Keras file holds beside layers: the state of training, and generators of random numbers in augmentation.
_IGNORED = re.compile(
    r"(optimizer|optimizer_weights|metrics|compile_metrics|loss_tracker)/.*|(.*/)?seed_generator(_\d+)?/.*"
)

_APPLICATIONS = {
    "stem.conv": "conv1_conv",
    "stem.norm": "conv1_bn",
    "stem.relu": "conv1_relu",
    "stem.pool": "pool1_pool",
    "head.flatten": "flatten",
    "head.pool": "avg_pool",
    "head.fc": "predictions",
    "head.softmax": "predictions_softmax",
}
_APPLICATIONS_BLOCK = {
    **{f"conv{i}": f"{i}_conv" for i in (1, 2, 3)},
    **{f"norm{i}": f"{i}_bn" for i in (1, 2, 3)},
    **{f"relu{i}": f"{i}_relu" for i in (1, 2, 3)},
    "shortcut.conv": "0_conv",
    "shortcut.norm": "0_bn",
    "shortcut.pad": "0_pad",
    "add": "add",
    "relu": "out",
}
_CLASSIC = {
    "stem.conv": "conv1",
    "stem.norm": "bn_conv1",
    "stem.relu": "conv1_relu",
    "stem.pool": "pool1",
    "head.flatten": "flatten",
    "head.pool": "pool5",
    "head.softmax": "prob",
}
_CLASSIC_BLOCK = {
    **{f"conv{i}": f"res{{}}_branch2{letter}" for i, letter in enumerate("abc", start=1)},
    **{f"norm{i}": f"bn{{}}_branch2{letter}" for i, letter in enumerate("abc", start=1)},
    **{f"relu{i}": f"res{{}}_branch2{letter}_relu" for i, letter in enumerate("abc", start=1)},
    "shortcut.conv": "res{}_branch1",
    "shortcut.norm": "bn{}_branch1",
    "shortcut.pad": "res{}_branch1",
    "add": "res{}",
    "relu": "res{}_relu",
}
_APPLICATIONS_CONV = re.compile(r"conv([2-9]|[1-9]\d{1,4})_block([1-9]\d{0,4})_([123])_conv/kernel")
_CLASSIC_LAYER = re.compile(r"(res|bn)([2-9]|[1-9]\d{1,4}?)([a-z]|b\d{1,5})(_branch(?:1|2[abc]))")
_CLASSIC_HEAD = re.compile(r"fc(\d{1,9})")


def block_names(count: int) -> list[str]:
    """Names of the blocks of a stage: a, b, c, …; in Caffe's form a, b1, b2, … where the alphabet does not suffice."""
    if count <= len(ascii_lowercase):
        return list(ascii_lowercase[:count])
    return ["a", *(f"b{i}" for i in range(1, count))]


def applications_layer(path: str, skeleton: Skeleton) -> str:
    """Name of any layer of any walk in keras.applications' scheme."""
    if not path.startswith("stages."):
        return _APPLICATIONS[path]
    _, stage, _, block, part = path.split(".", 4)
    return f"conv{int(stage) + 2}_block{int(block) + 1}_{_APPLICATIONS_BLOCK[part]}"


def classic_layer(path: str, skeleton: Skeleton) -> str:
    """Name of any layer of any walk in the classic scheme."""
    if path == "head.fc":
        return f"fc{skeleton.classes}"
    if not path.startswith("stages."):
        return _CLASSIC[path]
    _, stage, _, block, part = path.split(".", 4)
    letter = block_names(skeleton.blocks[int(stage)])[int(block)]
    return _CLASSIC_BLOCK[part].format(f"{int(stage) + 2}{letter}")


def usual(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The same tensors with the other spellings that Keras files have of some layers replaced by those used here.

    keras.applications' head was once ``probs``. The classic head counts the classes, and keeps its name where people
    change their number. Caffe's form of block names stands for short stages too (``res4b22`` in ResNet-101).
    """
    layers = list(dict.fromkeys(name.rpartition("/")[0] for name in tensors))
    blocks: dict[str, int] = {}
    for layer in layers:
        if match := _CLASSIC_LAYER.fullmatch(layer):
            blocks[match[2]] = max(blocks.get(match[2], 0), _block_index(match[3]) + 1)
    renamed: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        layer, _, array = name.rpartition("/")
        native = f"{_usual_layer(layer, layers, blocks, tensors)}/{array}" if layer else name
        if native in renamed:
            raise CheckpointError(f"{native} is there twice, once under another spelling; expected one of each name")
        renamed[native] = tensor
    return renamed


def _usual_layer(layer: str, layers: list[str], blocks: Mapping[str, int], tensors: Mapping[str, Stored]) -> str:
    if layer == "probs" and "predictions" not in layers:
        return "predictions"
    kernel = tensors.get(f"{layer}/kernel")
    if _CLASSIC_HEAD.fullmatch(layer) and kernel is not None and len(kernel.shape) == 2:
        return f"fc{kernel.shape[1]}"
    if match := _CLASSIC_LAYER.fullmatch(layer):
        kind, stage, block, branch = match.groups()
        index, count = _block_index(block), blocks[stage]
        form = ascii_lowercase[index] if count <= len(ascii_lowercase) or index == 0 else f"b{index}"
        return f"{kind}{stage}{form}{branch}"
    return layer


def _block_index(name: str) -> int:
    return ascii_lowercase.index(name) if len(name) == 1 else int(name[1:])


def _applications_skeleton(names: Mapping[str, Stored]) -> Skeleton | None:
    found = [tuple(map(int, match.groups())) for match in map(_APPLICATIONS_CONV.fullmatch, names) if match]
    return skeleton_from((stage - 2, block - 1, conv) for stage, block, conv in found)


def _classic_skeleton(names: Mapping[str, Stored]) -> Skeleton | None:
    layers = (_CLASSIC_LAYER.fullmatch(name.removesuffix("/kernel")) for name in names if name.endswith("/kernel"))
    skeleton = skeleton_from(
        (int(match[2]) - 2, _block_index(match[3]), "abc".index(match[4][-1]) + 1)
        for match in layers
        if match and match[4] != "_branch1"
    )
    head = next((match for match in map(_CLASSIC_HEAD.fullmatch, (n.partition("/")[0] for n in names)) if match), None)
    return skeleton and replace(skeleton, classes=int(head[1]) if head else None)


@dataclass(frozen=True, kw_only=True)
class _Keras:
    name: str
    title: str
    convention: Mapping[str, Any]
    layer: Callable[[str, Skeleton], str]
    skeleton: Callable[[Mapping[str, Stored]], Skeleton | None]
    projection_first: bool
    kernels: KernelLayout = "HWIO"
    metadata: Mapping[str, str] = field(default_factory=dict)

    def array(self, layer: str, kind: str, role: str, skeleton: Skeleton) -> str:
        return f"{self.layer(layer, skeleton)}/{ARRAYS[kind][role]}"

    def ignored(self, name: str) -> bool:
        return _IGNORED.fullmatch(name) is not None

    def usual(self, tensors: Mapping[str, Stored]) -> tuple[Mapping[str, Stored], tuple[str, ...]]:
        return usual(tensors), ()

    def told(self, path: Path) -> tuple[str, ...]:
        return ()

    def ordered(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        """The order of `model.layers` of a Keras model.

        Keras sorts by the distance from the output, so that a projection stands beside the last layers of its block:
        before them in keras.applications, which adds the branch to the shortcut; after them in the classic code, which
        adds the shortcut to the branch.
        """
        ordered: list[Layer] = []
        for _, group in groupby(layers, lambda layer: layer.path.split(".")[:4]):
            block = list(group)
            shortcut = [layer for layer in block if ".shortcut." in layer.path]
            branch = block[: len(block) - len(shortcut)]
            ordered += branch[: len(branch) - len(shortcut)]
            for pair in zip(branch[len(branch) - len(shortcut) :], shortcut, strict=True):
                ordered += reversed(pair) if self.projection_first else pair
        return ordered

    def counters(self, layer: Layer, scale: str) -> Mapping[str, np.ndarray]:
        return {}

    def beside(self, path: Path, spec: Spec) -> Mapping[str, str]:
        return {}


NAMINGS = {
    "keras_applications": _Keras(
        name="keras_applications",
        title="keras.applications",
        convention=CONVENTIONS["keras_applications"],
        layer=applications_layer,
        skeleton=_applications_skeleton,
        projection_first=True,
    ),
    "keras_classic": _Keras(
        name="keras_classic",
        title="classic Keras",
        convention=CONVENTIONS["keras_classic"],
        layer=classic_layer,
        skeleton=_classic_skeleton,
        projection_first=False,
    ),
}
