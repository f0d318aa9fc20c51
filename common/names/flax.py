"""The names of Flax's imagenet example: ``params/BottleneckResNetBlock_0/Conv_0/kernel``, ``batch_stats/bn_init/mean``.

A native name is the path of a variable, its collection first. Blocks are numbered through all stages, so that names
alone do not say where a stage begins: see `_Flax.skeleton`.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from common.architectures import Spec
from common.architectures.layers import Layer
from common.architectures.resnet import CONVENTIONS
from common.checkpoints.base import KernelLayout, Skeleton
from common.checkpoints.containers import Stored
from common.checkpoints.containers.trees import is_beside
from common.errors import CheckpointError

BLOCKS = {"basic": "ResNetBlock", "bottleneck": "BottleneckResNetBlock"}
_LAYERS = {"stem.conv": "conv_init", "stem.norm": "bn_init", "head.fc": "Dense_0"}
_IN_BLOCK = {
    **{f"conv{i + 1}": f"Conv_{i}" for i in range(3)},
    **{f"norm{i + 1}": f"BatchNorm_{i}" for i in range(3)},
    "shortcut.conv": "conv_proj",
    "shortcut.norm": "norm_proj",
}
# Kind of layer -> canonical role -> (collection, native leaf).
LEAVES: dict[str, dict[str, tuple[str, str]]] = {
    "conv": {"kernel": ("params", "kernel"), "bias": ("params", "bias")},
    "dense": {"kernel": ("params", "kernel"), "bias": ("params", "bias")},
    "norm": {
        "scale": ("params", "scale"),
        "bias": ("params", "bias"),
        "mean": ("batch_stats", "mean"),
        "var": ("batch_stats", "var"),
    },
}
_CONV = re.compile(r"params/(ResNetBlock|BottleneckResNetBlock)_(0|[1-9][0-9]{0,5})/Conv_([0-9])/kernel")


class _Flax:
    name = "flax"
    title = "the Flax example"
    kernels: KernelLayout = "HWIO"
    convention: Mapping[str, Any] = CONVENTIONS["flax_examples"]
    metadata: Mapping[str, str] = {}

    def skeleton(self, tensors: Mapping[str, Stored]) -> Skeleton | None:
        """A stage begins where a block has other output channels than the one before it, or projects its shortcut.

        So two stages of one width are seen as one where the second neither strides nor projects: with dilation, or
        with parameter-free shortcuts. No shape tells them apart.
        """
        last: dict[int, tuple[int, str]] = {}  # number of a block -> the last of its convolutions, and its class
        for match in filter(None, map(_CONV.fullmatch, tensors)):
            number, found = int(match[2]), (int(match[3]), match[1])
            last[number] = max(last.get(number, found), found)
        if not last:
            return None
        gap = next((number for number in range(len(last)) if number not in last), None)
        if gap is not None:
            raise CheckpointError(f"the blocks have a gap: number {gap} is missing, and {max(last)} is there")
        starts, width_before = [], None
        for number, (conv, cls) in sorted(last.items()):
            block = f"params/{cls}_{number}"
            width = tensors[f"{block}/Conv_{conv}/kernel"].shape[-1:]
            if width != width_before or f"{block}/conv_proj/kernel" in tensors:
                starts.append(number)
            width_before = width
        blocks = tuple(after - before for before, after in pairwise((*starts, len(last))))
        return Skeleton(block="basic" if last[0][1] == BLOCKS["basic"] else "bottleneck", blocks=blocks)

    def array(self, layer: str, kind: str, role: str, skeleton: Skeleton) -> str:
        collection, leaf = LEAVES[kind][role]
        return "/".join((collection, *module_path(layer, skeleton), leaf))

    def ignored(self, name: str) -> bool:
        return is_beside(name)

    def usual(self, tensors: Mapping[str, Stored]) -> tuple[Mapping[str, Stored], tuple[str, ...]]:
        return tensors, ()

    def told(self, path: Path) -> tuple[str, ...]:
        return ()

    def ordered(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        return layers

    def counters(self, layer: Layer, scale: str) -> Mapping[str, np.ndarray]:
        return {}

    def beside(self, path: Path, spec: Spec) -> Mapping[str, str]:
        return {}


NAMINGS = {"flax": _Flax()}


def module_path(layer: str, skeleton: Skeleton) -> tuple[str, ...]:
    """Path of the module of a layer that has arrays."""
    where, _, rest = layer.partition(".")
    if where != "stages":
        return (_LAYERS[layer],)
    stage, _, block, part = rest.split(".", 3)
    return block_name(int(stage), int(block), skeleton), _IN_BLOCK[part]


def block_name(stage: int, block: int, skeleton: Skeleton) -> str:
    """Name of a block's module: blocks are numbered through all stages."""
    first = (0, *accumulate(skeleton.blocks))[stage]
    return f"{BLOCKS[skeleton.block]}_{first + block}"
