"""torchvision's names, which timm and most PyTorch code share: ``layer3.0.conv1.weight``, ``layer3.0.downsample.1``."""

import re
from collections.abc import Mapping
from typing import Any

from common.checkpoints.base import KernelLayout, Skeleton, Stored, skeleton_from

_LAYERS = {"stem.conv": "conv1", "stem.norm": "bn1", "head.fc": "fc"}
_IN_BLOCK = {
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
_BLOCK = re.compile(r"layer([1-9]\d{0,4})\.(0|[1-9]\d{0,4})\.conv([1-9])\.weight", re.ASCII)


class _Torchvision:
    name = "torchvision"
    title = "torchvision and timm"
    kernels: KernelLayout = "OIHW"
    convention: Mapping[str, Any] = {}

    def skeleton(self, tensors: Mapping[str, Stored]) -> Skeleton | None:
        found = [tuple(map(int, match.groups())) for match in map(_BLOCK.fullmatch, tensors) if match]
        return skeleton_from((stage - 1, block, conv) for stage, block, conv in found)

    def array(self, layer: str, kind: str, role: str, skeleton: Skeleton) -> str:
        where, _, rest = layer.partition(".")
        if where == "stages":
            stage, _, block, part = rest.split(".", 3)
            native = f"layer{int(stage) + 1}.{block}.{_IN_BLOCK[part]}"
        else:
            native = _LAYERS[layer]
        return f"{native}.{ARRAYS[kind][role]}"

    def ignored(self, name: str) -> bool:
        return name.endswith(".num_batches_tracked")


NAMINGS = {"torchvision": _Torchvision()}
