"""torchvision's names, which timm and most PyTorch code share: ``layer3.0.conv1.weight``, ``layer3.0.downsample.1``."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from common.architectures import Spec
from common.architectures.layers import Layer
from common.checkpoints.base import KernelLayout, Skeleton, skeleton_from
from common.checkpoints.containers import Stored

LAYERS = {"stem.conv": "conv1", "stem.norm": "bn1", "head.fc": "fc"}
IN_BLOCK = {
    **{f"conv{i}": f"conv{i}" for i in (1, 2, 3)},
    **{f"norm{i}": f"bn{i}" for i in (1, 2, 3)},
    "shortcut.conv": "downsample.0",
    "shortcut.norm": "downsample.1",
}
ARRAYS = {
    "conv": {"kernel": "weight", "bias": "bias"},
    "norm": {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"},
    "dense": {"kernel": "weight", "bias": "bias"},
}


@dataclass(frozen=True, kw_only=True)
class StateDictNaming:
    """A community's names in a PyTorch state_dict, under torchvision's conventions."""

    name: str
    title: str
    layers: Mapping[str, str]
    block: str  # the name of a block, with {stage} and {block}
    first: int  # the number of the first stage
    in_block: Mapping[str, str]
    convolution: re.Pattern[str]  # of a block: its stage, its block, its own number
    first_convolution: int
    kernels: ClassVar[KernelLayout] = "OIHW"
    convention: ClassVar[Mapping[str, Any]] = {}
    metadata: ClassVar[Mapping[str, str]] = {"format": "pt"}  # transformers loads only files that state a framework

    def skeleton(self, tensors: Mapping[str, Stored]) -> Skeleton | None:
        found = [tuple(map(int, match.groups())) for match in map(self.convolution.fullmatch, tensors) if match]
        return skeleton_from((stage - self.first, b, conv - self.first_convolution + 1) for stage, b, conv in found)

    def array(self, layer: str, kind: str, role: str, skeleton: Skeleton) -> str:
        where, _, rest = layer.partition(".")
        if where == "stages":
            stage, _, block, part = rest.split(".", 3)
            native = f"{self.block.format(stage=int(stage) + self.first, block=block)}.{self.in_block[part]}"
        else:
            native = self.layers[layer]
        return f"{native}.{ARRAYS[kind][role]}"

    def ignored(self, name: str) -> bool:
        return name.endswith(".num_batches_tracked")

    def usual(self, tensors: Mapping[str, Stored]) -> tuple[Mapping[str, Stored], tuple[str, ...]]:
        return tensors, ()

    def told(self, path: Path) -> tuple[str, ...]:
        return ()

    def ordered(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        return layers

    def counters(self, layer: Layer, scale: str) -> Mapping[str, np.ndarray]:
        """PyTorch asks for the number of batches that a norm has seen when it loads strictly."""
        return {f"{scale.rpartition('.')[0]}.num_batches_tracked": np.zeros((), np.int64)}

    def beside(self, path: Path, spec: Spec) -> Mapping[str, str]:
        return {}


NAMINGS = {
    "torchvision": StateDictNaming(
        name="torchvision",
        title="torchvision and timm",
        layers=LAYERS,
        block="layer{stage}.{block}",
        first=1,
        in_block=IN_BLOCK,
        convolution=re.compile(r"layer([1-9]\d{0,4})\.(0|[1-9]\d{0,4})\.conv([1-9])\.weight", re.ASCII),
        first_convolution=1,
    )
}
